"""Whether hooks observe a module: then it is called as one, and not fused with its neighbours."""

from torch.nn.modules import module as torch_module


def is_plain(module, kind):
    """Whether calling `module` does what the class `kind` defines and nothing else: no hooks, no forward of its own."""
    return type(module) is kind and is_unhooked(module) and not torch_module._has_any_global_hook()


def is_unhooked(*modules):
    """Whether the modules themselves have no hooks, and no forward in place of their class's."""
    for module in modules:
        held = module.__dict__
        if (
            held["_forward_hooks"]
            or held["_forward_pre_hooks"]
            or held["_backward_hooks"]
            or held["_backward_pre_hooks"]
            or "forward" in held
        ):
            return False
    return True
