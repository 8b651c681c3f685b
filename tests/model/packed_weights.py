"""The published forms of quantised weights, packed one code at a time, each with the matrix that it means."""

import torch

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def words(codes):
    """[..., n] codes 0..15 to [..., n / 8] int32, the first in the lowest bits."""
    eights = codes.to(torch.int64).unflatten(-1, (-1, 8))
    packed = sum(eights[..., i] << (4 * i) for i in range(8))
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def quantise(weight, group, row_group):
    """4-bit codes [in, out], zero points and scales [groups, out], and the float32 matrix [out, in] that they mean."""
    x = weight.t().contiguous()
    groups = int(row_group.max()) + 1
    low = torch.stack([x[row_group == g].amin(0) for g in range(groups)]).clamp(max=0)
    high = torch.stack([x[row_group == g].amax(0) for g in range(groups)]).clamp(min=0)
    scales = ((high - low) / 15).to(torch.float16)
    # GPTQ before v2 cannot say 0 without spilling into its neighbours.
    zeros = (-low / scales.float()).round().clamp(1, 15)
    codes = (x / scales.float()[row_group] + zeros[row_group]).round().clamp(0, 15)
    return codes, zeros, scales, ((codes - zeros[row_group]) * scales.float()[row_group]).t().contiguous()


def gptq(name, weight, group, rng, settings):
    inputs = weight.shape[1]
    size = inputs if group == -1 else group
    row_group = torch.arange(inputs) // size
    if settings["desc_act"]:
        row_group = row_group[torch.randperm(inputs)]
    codes, zeros, scales, meant = quantise(weight, size, row_group)
    stored = zeros - int(settings["checkpoint_format"] == "gptq")
    parts = {
        f"{name}.qweight": words(codes.t()).t().contiguous(),
        f"{name}.qzeros": words(stored),
        f"{name}.scales": scales,
        f"{name}.g_idx": row_group.to(torch.int32),
    }
    if not settings["desc_act"] and rng.random() < 0.3:
        del parts[f"{name}.g_idx"]
    return parts, meant


def awq(name, weight, group, rng, settings):
    codes, zeros, scales, meant = quantise(weight, group, torch.arange(weight.shape[1]) // group)
    shuffled = lambda x: words(x.unflatten(-1, (-1, 8))[..., AWQ_ORDER].flatten(-2))
    return {f"{name}.qweight": shuffled(codes), f"{name}.qzeros": shuffled(zeros), f"{name}.scales": scales}, meant


def fp8(name, weight, block, rng, settings):
    rows, columns = weight.shape
    high, wide = -(-rows // block[0]), -(-columns // block[1])
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales, meant = torch.empty(high, wide), torch.empty_like(weight)
    for i in range(high):
        for j in range(wide):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scales[i, j] = weight[part].abs().max() / 448
            codes[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
            meant[part] = codes[part].float() * scales[i, j]
    return {f"{name}.weight": codes, f"{name}.weight_scale_inv": scales}, meant
