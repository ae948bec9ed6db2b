"""The attention kernels inside Hugging Face's transformers, 4.56 and newer: GPT-2 and other multi-head decoders.

    from model.integrations.transformers import register
    register()
    AutoModelForCausalLM.from_pretrained("gpt2", attn_implementation="triton_flash")

transformers asks an attention implementation for two functions: one makes the mask of a forward pass, once, and the
other computes each layer's attention. Masks that hide keys before a row's first and after its last are bounds, which
cost nothing: an int32 tensor [B, 1, 1, 3] of kv_start, kv_end and q_start (kernels.flash_attention), in four dimensions
because transformers hands masks of four dimensions on as they are. What is not of that kind is refused, or, where the
caller has chosen so, masked by torch's SDPA.
"""

import torch
import torch.nn.functional as F

from kernels import flash_attention
from model.inputs import can_be_read, padding_bounds
from model.integrations.patch import patch_gpt2

__all__ = ["patch_gpt2", "register"]

NAME = "triton_flash"
EVERY_KEY = 2**30  # a q_start from which a causal query sees every key
OTHER_MASKS = ("refuse", "sdpa")
# What models hand to an attention function that changes its result and that the kernels do not compute.
_UNSERVED = ("softcap", "position_bias", "s_aux", "sinks", "head_mask", "cache", "output_attentions")
_registered: set[str] = set()


def register(name=NAME, *, other_masks="refuse"):
    """Makes `attn_implementation=name` of transformers' models the kernels of this project. Returns the name.

    other_masks: what happens to a mask that is no interval of keys per row (holes, packed texts, sliding windows,
    tensors of one's own): "refuse" raises ValueError with the reason, "sdpa" computes those calls by torch's SDPA.
    A second call with the same name replaces the first. Key and value heads may be fewer than query heads.
    Raises ImportError without transformers, ValueError for names that transformers itself uses.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"register: name is {name!r:.60}; it must be a string, as in register('{NAME}')")
    if other_masks not in OTHER_MASKS:
        raise ValueError(f"register: other_masks is {other_masks!r:.60}; choose one of {', '.join(OTHER_MASKS)}")
    from transformers import AttentionInterface, AttentionMaskInterface, modeling_utils

    taken = {"eager", *AttentionInterface().valid_keys()} - _registered
    if name in taken:
        raise ValueError(f"register: {name!r} is a name of transformers' own; choose another, such as {NAME!r}")

    def mask(*args, **options):
        return attention_bounds(*args, **options, other_masks=other_masks)

    def attend(*args, **options):
        return attention_forward(*args, **options, other_masks=other_masks)

    _registered.add(name)
    _do_not_fetch(modeling_utils)
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, mask)
    return name


def _do_not_fetch(modeling_utils):
    """Keeps transformers 5, to which each name with "flash" in it is a package of the Hub, from fetching ours."""
    load = getattr(modeling_utils, "lazy_import_flash_attention", None)
    if load is None or hasattr(load, "of_gpt2_triton"):
        return

    def lazy_import_flash_attention(implementation, *args, **options):
        return None if implementation in _registered else load(implementation, *args, **options)

    lazy_import_flash_attention.of_gpt2_triton = True
    modeling_utils.lazy_import_flash_attention = lazy_import_flash_attention


def attention_bounds(
    batch_size,
    q_length=None,
    kv_length=None,
    q_offset=0,
    kv_offset=0,
    mask_function=None,
    attention_mask=None,
    local_size=None,
    allow_is_causal_skip=True,
    cache_position=None,
    device=None,
    other_masks="refuse",
    **options,
):
    """The mask of a forward pass, as transformers.masking_utils.sdpa_mask: bounds, or None where causality is all.

    attention_mask: bool [B, keys], or None. cache_position: of transformers 4, in q_length's and q_offset's place.
    """
    from transformers import masking_utils

    if cache_position is not None:
        q_length, q_offset = cache_position.shape[0], cache_position[0]
        device = cache_position.device
    causal = mask_function in (None, masking_utils.causal_mask_function)
    if not causal and local_size is not None and allow_is_causal_skip and isinstance(q_offset, int):
        causal = q_offset + q_length <= local_size  # a window that nothing lies outside
    if not causal and mask_function is not getattr(masking_utils, "bidirectional_mask_function", None):
        # transformers 4 says of any text without a mask that it may be packed: what the function gives decides.
        visible = masking_utils.sdpa_mask(
            **_positions(batch_size, q_length, kv_length, q_offset, kv_offset, cache_position, device),
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            **{key: options[key] for key in ("use_vmap",) if key in options},
        )
        found = _found_bounds(visible, q_length, kv_length)[1]
        if found is not None:
            return found
        reason = "packed texts, a sliding window or a function of the model's own hide keys between others"
        return _other_mask(other_masks, reason, lambda: visible)
    start = end = None
    if attention_mask is not None:
        attention_mask = F.pad(attention_mask, (0, max(kv_length + kv_offset - attention_mask.shape[-1], 0)))
        attention_mask = attention_mask[:, kv_offset : kv_offset + kv_length]
        try:
            start, end = padding_bounds(attention_mask, batch_size, kv_length)
        except ValueError as error:
            return _other_mask(
                other_masks, error, lambda: _dense(attention_mask, q_length, q_offset, kv_offset, causal)
            )
    first = q_offset - kv_offset  # the first query's place among the keys
    if isinstance(first, torch.Tensor) and can_be_read(first) and first.device.type == "cpu":
        first = int(first)
    if causal and start is None and isinstance(first, int) and first + q_length == kv_length:
        return None
    bounds = torch.zeros(batch_size, 3, dtype=torch.int32, device=device)
    bounds[:, 1] = kv_length
    if start is not None:
        bounds[:, 0], bounds[:, 1] = start, end
    bounds[:, 2] = first if causal else EVERY_KEY
    return bounds[:, None, None]  # [B, 1, 1, 3]


def _positions(batch_size, q_length, kv_length, q_offset, kv_offset, cache_position, device):
    """What sdpa_mask is told of sizes, in its own version's words."""
    sizes = {"batch_size": batch_size, "kv_length": kv_length, "kv_offset": kv_offset}
    if cache_position is not None:
        return {**sizes, "cache_position": cache_position}
    return {**sizes, "q_length": q_length, "q_offset": q_offset, "device": device}


def _dense(keys, q_length, q_offset, kv_offset, causal):
    """bool [B, 1, T_q, T_k] of the visible keys among `keys`, bool [B, T_k]."""
    visible = keys[:, None, None]  # [B, 1, 1, T_k]
    if not causal:
        return visible.expand(-1, -1, q_length, -1)
    key = torch.arange(keys.shape[1], device=keys.device) + kv_offset
    query = torch.arange(q_length, device=keys.device) + q_offset
    return visible & (key <= query[:, None])


def _other_mask(other_masks, reason, dense):
    if other_masks == "sdpa":
        return dense()
    raise ValueError(
        f"{NAME}: {reason}; the kernels take intervals of keys. register(other_masks='sdpa') computes such calls by "
        "torch's SDPA"
    )


def attention_forward(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout=0.0,
    scaling=None,
    is_causal=None,
    other_masks="refuse",
    **options,
):
    """One layer's attention, as transformers calls it: ([B, T_q, H, D], None).

    query [B, H, T_q, D]; key, value [B, H_kv, T_k, D], H a multiple of H_kv. attention_mask: what attention_bounds
    gave, or a mask of one's own: bool, or floats to be added, [B, 1 or H, T_q, T_k].
    """
    for name in _UNSERVED:
        if options.get(name) is not None and options[name] is not False:
            raise ValueError(f"{NAME}: {name} was asked for, which the kernels do not compute; 'eager' may")
    window = options.get("sliding_window")
    if attention_mask is None and window is not None and key.shape[2] > window:
        raise ValueError(f"{NAME}: sliding_window is {window} and there are {key.shape[2]} keys, but no mask came")
    scaling = _gpt2_scale(module, query.shape[-1]) if scaling is None else scaling
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    call = {"scale": scaling, "dropout_p": dropout, "causal": bool(causal)}
    if attention_mask is None:
        call["causal"] = call["causal"] and query.shape[2] > 1  # a single query sees every key, as everywhere there
    elif attention_mask.dtype == torch.int32 and attention_mask.shape[1:] == (1, 1, 3):
        call.update(_bounds(attention_mask), causal=True)
    else:
        visible, found = _found_bounds(attention_mask, query.shape[2], key.shape[2])
        if found is None:
            o = _other_mask(
                other_masks,
                "the attention mask that came is no interval of keys for each row",
                lambda: _by_sdpa(query, key, value, attention_mask, visible, call),
            )
            return o.transpose(1, 2), None
        call.update(_bounds(found), causal=True)
    return _grouped(query, key, value, call).transpose(1, 2), None


def _bounds(mask):
    """The keyword arguments that a tensor [B, 1, 1, 3] of bounds stands for."""
    return dict(zip(("kv_start", "kv_end", "q_start"), mask[:, 0, 0].unbind(1)))


def _grouped(q, k, v, call):
    """Attention of q [B, H, T_q, D] over k, v [B, H_kv, T_k, D], which are read in place by each of their H / H_kv."""
    B, H, T_q, D = q.shape
    H_kv = k.shape[1]
    if H_kv == H:
        return flash_attention(q, k, v, **call)
    if H % H_kv:
        raise ValueError(f"{NAME}: {H} query heads for {H_kv} key heads; the first must be a multiple of the second")
    groups = q.view(B, H_kv, H // H_kv, T_q, D)
    every = [flash_attention(group, k, v, **call) for group in groups.unbind(2)]  # each [B, H_kv, T_q, D]
    return torch.stack(every, 2).view(B, H, T_q, D)


def _gpt2_scale(module, head_dim):
    """transformers 4 lets each attention function of GPT-2 find its scale; None is 1 / sqrt(D)."""
    scale = head_dim**-0.5 if getattr(module, "scale_attn_weights", True) else 1.0
    return scale / (module.layer_idx + 1) if getattr(module, "scale_attn_by_inverse_layer_idx", False) else scale


def _found_bounds(mask, T_q, T_k):
    """(visible bool [B, 1 or H, T_q, T_k], the bounds [B, 1, 1, 3] that say the same, or None).

    Costs a GPU a synchronisation. Added masks hide a key by a number that no score outweighs.
    """
    if mask.dim() != 4 or mask.shape[3] != T_k or mask.shape[2] not in (1, T_q):
        raise ValueError(
            f"{NAME}: attention_mask has shape {tuple(mask.shape)}; it must be [B, 1 or H, 1 or T_q, T_k], with T_q = "
            f"{T_q} and T_k = {T_k}"
        )
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    visible = visible.expand(-1, -1, T_q, -1)
    if not can_be_read(mask) or (mask.dtype != torch.bool and (mask.where(visible, 0) != 0).any()):
        return visible, None  # scores are added to, too
    some = visible.any(2).any(1)  # [B, T_k]
    key = torch.arange(T_k, device=mask.device)
    start = some.int().argmax(-1)
    end = torch.where(some, key + 1, 0).amax(-1)
    start = torch.minimum(start, end)
    inside = ((key >= start[:, None]) & (key < end[:, None]))[:, None, None]  # [B, 1, 1, T_k]
    for first in (T_k - T_q, EVERY_KEY):
        query = torch.arange(T_q, device=mask.device)[:, None] + first
        if torch.equal((inside & (key <= query)).expand(visible.shape), visible):
            bounds = torch.stack([start, end, torch.full_like(start, first)], -1).int()
            return visible, bounds[:, None, None]
    return visible, None


def _by_sdpa(q, k, v, mask, visible, call):
    """torch's SDPA under a dense mask; a query that sees no key gives 0, as in the kernels."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=call["dropout_p"], scale=call["scale"])
    return o.masked_fill(~visible.any(-1, keepdim=True), 0.0)
