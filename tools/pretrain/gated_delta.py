"""The gated delta rule in chunks of 64 tokens, parallel over all chunks, in plain torch and differentiable.

Per head, with keys of length one, decay a_t = exp(g_t) and learning rate b_t (Yang et al. 2024, arXiv 2412.06464):
    S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T,    o_t = S_t^T q_t / sqrt(key_dim)
In a chunk that begins with state S, with c the running sum of g and D_ij = exp(c_i - c_j) for i >= j:
    T = (I + strictly_lower(b_i k_i.k_j D_ij))^-1,  U = T (b v),  W = T (b e^c k)
    outputs = (q e^c) S + lower(q k^T D) (U - W S)
    S' = M S + N,  M = e^c_last I - (k e^{c_last - c})^T W,  N = (k e^{c_last - c})^T U
The chunks' first states follow from M and N by a scan of logarithmic depth. Exponents are never positive.
"""

import torch

CHUNK = 64


def unit_lower_inverse(strictly_lower: torch.Tensor) -> torch.Tensor:
    """(I + A)^-1 for strictly lower A [..., 64, 64], differentiable.

    Powers of the whole of A may overflow where keys repeat, so blocks of 8 are inverted by powers and then joined in pairs:
    the inverse X of the blocks and the part C below them give X - X C X. A Newton step carries the gradient."""
    with torch.no_grad():
        size = strictly_lower.shape[-1]
        index = torch.arange(size, device=strictly_lower.device)
        eye = torch.eye(size, device=strictly_lower.device, dtype=strictly_lower.dtype)

        def same_block(width: int) -> torch.Tensor:
            return index[:, None] // width == index[None] // width

        block = strictly_lower * same_block(8)
        square = block @ block
        inverse = eye - block
        inverse = inverse + inverse @ square
        inverse = inverse + inverse @ (square @ square)
        width = 8
        while width < size:
            below = strictly_lower * (same_block(2 * width) & ~same_block(width))
            inverse = inverse - inverse @ (below @ inverse)
            width *= 2
    return 2 * inverse - inverse @ (inverse + strictly_lower @ inverse)


def chunk_terms(q, k, v, beta, decay):
    """What does not depend on the states. q, k [chunks, 64, key_heads, key_dim], v [chunks, 64, value_heads, value_dim],
    beta and decay (logarithmic) [chunks, 64, value_heads]; all float32, q and k not yet normalised.

    Returns M, N, decayed queries, W, U, attention inside the chunk: each [chunks, value_heads, ., .]."""
    q = q * torch.rsqrt(q.square().sum(-1, keepdim=True) + 1e-6) * q.shape[-1] ** -0.5
    k = k * torch.rsqrt(k.square().sum(-1, keepdim=True) + 1e-6)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    groups = v.shape[1] // k.shape[1]
    inner = (k @ k.transpose(-1, -2)).repeat_interleave(groups, 1)
    scores = (q @ k.transpose(-1, -2)).repeat_interleave(groups, 1)
    q, k = q.repeat_interleave(groups, 1), k.repeat_interleave(groups, 1)
    beta = beta.transpose(1, 2)[..., None]
    total = decay.transpose(1, 2).cumsum(-1)[..., None]  # [chunks, heads, 64, 1]
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    pairwise = (total - total.transpose(-1, -2)).masked_fill(~lower, float("-inf")).exp()
    inverse = unit_lower_inverse((inner * pairwise * beta).tril(-1))
    update = inverse @ (v * beta)
    read = inverse @ (k * (beta * total.exp()))
    last = total[:, :, -1:]
    late_keys = (k * (last - total).exp()).transpose(-1, -2)
    eye = torch.eye(k.shape[-1], device=k.device, dtype=k.dtype)
    return (last.exp() * eye - late_keys @ read, late_keys @ update, q * total.exp(), read, update, scores * pairwise)


def chunk_outputs(states, queries, read, update, attention):
    """[chunks, 64, value_heads, value_dim] from the states at the chunks' beginnings [chunks, value_heads, key_dim, value_dim]."""
    return (queries @ states + attention @ (update - read @ states)).transpose(1, 2)


def _scan(transition: torch.Tensor, addend: torch.Tensor) -> torch.Tensor:
    """S_0 = 0, S_{c+1} = M_c S_c + N_c for M, N [rows, chunks, ...]: the states before each chunk, by pairing neighbours."""
    chunks = transition.shape[1]
    if chunks == 1:
        return torch.zeros_like(addend)
    odd = chunks % 2
    end = chunks - odd
    first, second = transition[:, 0:end:2], transition[:, 1:end:2]
    first_addend, second_addend = addend[:, 0:end:2], addend[:, 1:end:2]
    if chunks == 2:
        return torch.stack((torch.zeros_like(first_addend), first_addend), 2).flatten(1, 2)
    pair_addend = second @ first_addend + second_addend
    if odd:  # the last state follows from the pairs alone
        before = _scan(
            torch.cat((second @ first, transition[:, end:]), 1), torch.cat((pair_addend, addend[:, end:]), 1)
        )
        before, last = before[:, :-1], before[:, -1:]
    else:
        before = _scan(second @ first, pair_addend)
    states = torch.stack((before, first @ before + first_addend), 2).flatten(1, 2)
    return torch.cat((states, last), 1) if odd else states


class _ChunkStates(torch.autograd.Function):
    """The scan; its adjoint runs the same recurrence backwards with M transposed."""

    @staticmethod
    def forward(ctx, transition, addend):
        states = _scan(transition, addend)
        ctx.save_for_backward(transition, states)
        return states

    @staticmethod
    def backward(ctx, grad):
        transition, states = ctx.saved_tensors
        # G_c, the gradient of S_{c+1}: G_last = 0, G_{c-1} = dL/dS_c + M_c^T G_c; the scan runs over c downwards.
        reversed_transition = transition.flip(1).transpose(-1, -2)
        after = _scan(reversed_transition, grad.flip(1)).flip(1)
        return after @ states.transpose(-1, -2), after


def chunk_states(transition: torch.Tensor, addend: torch.Tensor, rows: int) -> torch.Tensor:
    """States at the beginnings of the chunks [rows * chunks of a row, heads, key_dim, value_dim]; each row begins with 0."""
    shape = addend.shape
    transition, addend = (x.view(rows, -1, *x.shape[1:]) for x in (transition, addend))
    return _ChunkStates.apply(transition, addend).reshape(shape)
