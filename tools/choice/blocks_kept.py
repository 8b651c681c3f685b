"""How much of a step's choice is still at hand from the steps before: an LRU of blocks, layer by layer and set by set."""

import torch

from choice.forms import Form, Step, counts


def miss_shares(
    chosen: list[torch.Tensor], reserved: list[torch.Tensor], sizes: tuple[float, ...], warm: int
) -> list[float]:
    """Shares of the chosen blocks that an LRU does not hold, over steps from `warm` on. chosen [layers, sets, blocks] and reserved
    [blocks], bool, of each step. Reserved blocks are always held, so that a block which leaves the recent ones is still there; the
    rest of the room is the layer's and set's own mean count x size, at least one block."""
    blocks = chosen[0].shape[-1]
    # In float64 a whole mean stays whole.
    total = torch.stack([step.sum(-1) for step in chosen]).sum(0).double()
    room = [(total * size / len(chosen)).ceil().clamp(min=1).unsqueeze(-1) for size in sizes]
    index = torch.arange(blocks, device=chosen[0].device)
    last = torch.full(chosen[0].shape, -1, device=chosen[0].device, dtype=torch.long)  # later use, higher number
    missed, wanted = [0] * len(sizes), 0
    for time, (step, always) in enumerate(zip(chosen, reserved)):
        if time >= warm:
            rank = last.argsort(-1, descending=True).argsort(-1)
            beside = int(reserved[time - 1].sum())
            for i, most in enumerate(room):
                held = (rank < most + beside) & (last >= 0)
                missed[i] += int((step & ~held).sum())
            wanted += int(step.sum())
        last = torch.where(step | always, time * blocks + index, last)
    return [count / max(1, wanted) for count in missed]


SIZES = (1, 2, 4)
# Each at the parameter that gives the prompt's steps the captured mass beside it.
FORMS = [
    (Form.parse(label), mass)
    for mass in (0.85, 0.9, 0.95)
    for label in (
        "layer/16/128/256/count",
        "group/16/128/256/count",
        "layer/16/16/64/threshold",
        "group/16/16/64/threshold",
        "group/8/16/64/threshold",
    )
]


def residency(steps: list[Step], warm: int) -> list[dict]:
    """What each of FORMS chooses in consecutive steps: repeated is the share of a step's blocks that the step before chose too,
    missed the share that an LRU of 1x, 2x, 4x the mean choice does not hold."""
    out = []
    for form, mass in FORMS:
        curves = [step.curve(form) for step in steps]
        reads, masses = (torch.stack([curve[i].mean(0) for curve in curves]).mean(0) for i in (0, 1))
        at = min(int((masses < mass).sum()), len(masses) - 1)
        chosen, reserved = [], []
        blocks = -(-steps[-1].probabilities.shape[-1] // form.block)
        for step in steps:
            ranking = step.ranking(form)
            taken = counts(form, ranking)[..., at]
            missing = (0, blocks - ranking.order.shape[-1] - ranking.num_reserved)
            chosen.append(torch.nn.functional.pad(ranking.chosen(taken), missing))
            always = torch.ones(blocks, dtype=torch.bool, device=taken.device)
            always[ranking.begin : ranking.end] = False  # blocks that are yet to come too
            reserved.append(always)
        same = [int((a & b).sum()) / max(1, int(b.sum())) for a, b in zip(chosen, chosen[1:])]
        out.append(
            {
                "form": form.label,
                "target": mass,
                "mass": float(masses[at]),
                "read": float(reads[at]),
                "repeated": sum(same) / len(same),
                "missed": miss_shares(chosen, reserved, SIZES, warm),
            }
        )
    return out
