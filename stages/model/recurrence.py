"""Gated DeltaNet layers on rows ``[prompt | chosen | rejected]`` (Qwen3.5).

Such a layer is a convolution over the last few tokens and a recurrence, whose state holds all that
was read (arXiv 2412.06464). No attention mask can hide chosen from rejected there. So the prompt is
read once, and each answer goes on from the state and the window in which it ended: the same numbers
as with a row for each, in scoring and in training. The rule itself is transformers' or fla's.
"""

from types import MethodType
from typing import Any

FORK = "fork"  # attribute of the attention mask of such rows


def layers(language_model: Any) -> list[Any]:
    """The recurrent layers, if the model has any. From now on they read rows whose mask has a
    ``FORK`` as such; any other input goes as before.
    """
    nets = [layer.linear_attn for layer in language_model.layers if hasattr(layer, "linear_attn")]
    for net in nets:
        if "forward" not in vars(net):
            net.forward = MethodType(either, net)
    return nets


def either(
    net: Any, hidden_states: Any, cache_params: Any = None, attention_mask: Any = None
) -> Any:
    fork = getattr(attention_mask, FORK, None)
    if fork is None:
        return type(net).forward(net, hidden_states, cache_params, attention_mask)
    return forked(net, hidden_states, *fork)


def parts(segments: Any, *which: int) -> Any:
    """Where the tokens of the parts are: for each part and row of ``segments`` (n, width), their
    places, then any others, and whether a place counts; (parts · n, longest part) both.
    """
    import torch

    belongs = torch.cat([segments == part for part in which])
    longest = max(int(belongs.sum(dim=1).max()), 1)
    places = (~belongs).long().argsort(dim=1, stable=True)[:, :longest]
    return places, belongs.gather(1, places)


def forked(net: Any, hidden: Any, prompt: Any, answers: Any) -> Any:
    """A layer's output (n, width, hidden size), with ``parts`` of the prompt and of both answers;
    as ``Qwen3_5GatedDeltaNet.forward`` (transformers 5.6), 0 for what belongs to no part.
    """
    import torch
    from torch.nn.functional import softplus

    n, width, _ = hidden.shape
    given = {
        "mixed": net.in_proj_qkv(hidden),
        "beta": net.in_proj_b(hidden).sigmoid(),
        "decay": -net.A_log.float().exp() * softplus(net.in_proj_a(hidden).float() + net.dt_bias),
    }
    window = given["mixed"].new_zeros(n, net.conv_kernel_size - 1, net.conv_dim)
    found, window, state = read(net, given, prompt, window, None)
    twice = {name: torch.cat([values, values]) for name, values in given.items()}
    said, *_ = read(net, twice, answers, torch.cat([window] * 2), torch.cat([state] * 2))
    out = hidden.new_zeros(n, width, *found.shape[2:])
    for (places, counts), values in ((prompt, found), (answers, said)):
        row = torch.arange(len(places), device=hidden.device)[:, None] % n
        where = (row.expand_as(places)[counts], places[counts])
        out = out.index_put(where, values[counts].to(out.dtype))
    gate = net.in_proj_z(hidden).reshape(-1, net.head_v_dim)
    return net.out_proj(net.norm(out.reshape(-1, net.head_v_dim), gate).reshape(n, width, -1))


def read(
    net: Any, given: dict[str, Any], where: tuple[Any, Any], window: Any, state: Any
) -> tuple[Any, Any, Any]:
    """What the layer says at each place (rows, places, heads, size), and the window and the state
    after the last place that counts. The others follow those, and leave the state as it is.
    """
    places, counts = where
    import torch
    from torch.nn.functional import silu

    def those(values: Any) -> Any:
        return values.gather(1, places[..., None].expand(-1, -1, values.shape[-1]))

    length, before = places.shape[1], window.shape[1]
    row = torch.cat([window, those(given["mixed"])], dim=1)
    mixed = silu(net.conv1d(row.transpose(1, 2))[..., before : before + length]).transpose(1, 2)
    query, key, value = mixed.split([net.key_dim, net.key_dim, net.value_dim], dim=-1)
    query, key = (
        heads.reshape(len(places), length, -1, net.head_k_dim).repeat_interleave(
            net.num_v_heads // net.num_k_heads, dim=2
        )
        for heads in (query, key)
    )
    said, state = net.chunk_gated_delta_rule(
        query,
        key,
        value.reshape(len(places), length, -1, net.head_v_dim),
        g=those(given["decay"]) * counts[..., None],
        beta=those(given["beta"]) * counts[..., None],
        initial_state=state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    last = counts.sum(dim=1)[:, None] + torch.arange(before, device=places.device)
    return said, row.gather(1, last[..., None].expand(-1, -1, row.shape[-1])), state
