"""Whether hooks observe a module: then it is called as one, and not fused with its neighbours."""

from torch.nn.modules import module as torch_module


def is_plain(module, kind):
    """Whether calling `module` does what the class `kind` defines and nothing else: no hooks, no forward of its own."""
    return is_unobserved(module, kind) and not torch_module._has_any_global_hook()


def is_unobserved(module, kind):
    """As is_plain, but for hooks on all modules."""
    return (
        type(module) is kind
        and not (
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        )
        and "forward" not in module.__dict__
    )
