"""The training loop: a curriculum of lengths by share of time, position jumps, statistics by task."""

import dataclasses
import json
import math
import multiprocessing
import os
import pathlib
import random
import time

import numpy as np
import torch
import torch.distributed as dist

from . import checkpoint, evaluate
from .binding import Binding, choose
from .models import MAX_POSITIONS, TinyModel
from .optimizer import Optimizer
from .pieces import NUM_LABELS, SLOTS, TEXT, Pieces
from .rows import Rows

PHASES = "256:.07,512:.07,1024:.08,2048:.12,512+1024+4096:.15,1024+4096+16384:.23,4096+16384+32768+65536:.28"
FIRST_WEIGHT = 3.0  # of the tokens that tell which answer it is, where the others weigh 1


@dataclasses.dataclass
class Options:
    """What a run needs; seconds are those of training, `until` is when everything must be over (seconds since the epoch)."""

    work: pathlib.Path
    tokenizer: pathlib.Path
    out: pathlib.Path
    seconds: float
    until: float
    eval_seconds: float
    eval_lengths: list[int]
    phases: list[tuple[list[int], float]]
    tokens: int = 65_536  # of a step
    muon_rate: float = 0.015
    adam_rate: float = 0.004
    warmup: int = 100
    decay: float = 0.35  # share of the time in which the rates fall to nothing
    binding: float = 0.2  # weight of binding.py's losses; 0: without them
    jumps: float = 0.3  # share of the steps with jumps of position
    workers: int = 4
    save_every: float = 60.0
    log_every: float = 10.0
    seed: int = 0


def parse_phases(text: str) -> list[tuple[list[int], float]]:
    """ "256:.1,512+1024:.9": lengths and the shares of time spent on them; lengths are multiples of 64."""
    phases = [
        ([int(length) for length in part.split(":")[0].split("+")], float(part.split(":")[1]))
        for part in text.split(",")
    ]
    if any(length % 64 for lengths, _ in phases for length in lengths):
        raise SystemExit(f"--phases {text}: lengths must be multiples of 64")
    whole = sum(share for _, share in phases)
    return [(lengths, share / whole) for lengths, share in phases]


class Batches(torch.utils.data.IterableDataset):
    """Endless batches (tokens [rows, length + 1], labels, what binding.choose gives) of the phase that `phase` holds when they are made.

    Processes that train one model together (`rank` of them) draw other rows of the same lengths, so that none waits for another."""

    def __init__(self, options: Options, phase, rank: int):
        self.options, self.phase, self.rank = options, phase, rank

    def __iter__(self):
        options, worker = self.options, torch.utils.data.get_worker_info()
        torch.set_num_threads(1)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        seed = options.seed * 1000 + (worker.id if worker else 0)
        lengths = random.Random(seed)
        rows = Rows(Pieces(options.work, options.tokenizer, seed + 1_000_000 * self.rank))
        while True:
            length = lengths.choice(options.phases[self.phase.value][0])
            made = [rows.row(length) for _ in range(max(1, options.tokens // length))]
            tokens = np.stack([ids for ids, _, _ in made]).astype(np.int64)
            arrays = (
                tokens,
                np.stack([labels for _, labels, _ in made]),
                *choose(rows.rng, [bindings for _, _, bindings in made]),
            )
            yield tuple(map(torch.from_numpy, arrays))


class Group:
    """The processes that train one model, each on rows of its own; one alone unless a launcher such as torchrun started several."""

    def __init__(self):
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def from_first(self, *values: float) -> list[float]:
        """The first process's values: what depends on its clock must be the same everywhere."""
        if self.size == 1:
            return list(values)
        told = torch.tensor(values, dtype=torch.float64)
        dist.broadcast(told, 0)
        return told.tolist()

    def average_gradients(self, weights: list[torch.Tensor]) -> None:
        if self.size > 1:
            flat = torch.cat([weight.grad.flatten() for weight in weights])
            dist.all_reduce(flat)
            flat /= self.size
            for weight, mean in zip(weights, flat.split([weight.numel() for weight in weights])):
                weight.grad.copy_(mean.view_as(weight))

    def add_up(self, sums: torch.Tensor) -> None:
        if self.size > 1:
            dist.all_reduce(sums)


class Statistics:
    """Counts, hits and losses by label since the last report, kept on the device."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(3, NUM_LABELS, device=device)
        self.binding = torch.zeros(2, device=device)
        self.binding_steps = [0, 0]  # whose loss was the mean of some bindings

    def add_binding(self, losses: list[torch.Tensor], bindings: list[torch.Tensor]) -> None:
        self.binding += torch.stack(losses).detach()
        self.binding_steps = [steps + (len(part) > 0) for steps, part in zip(self.binding_steps, bindings)]

    def add(self, labels: torch.Tensor, hits: torch.Tensor, losses: torch.Tensor) -> None:
        labels = labels.long()
        for at, weights in enumerate((torch.ones_like(losses), hits.float(), losses)):
            self.sums[at].index_add_(0, labels, weights)

    def report(self, group: Group) -> dict[str, float]:
        """Text loss, answer loss, binding losses and accuracies; a slot's name with * is for the first tokens, the honest ones."""
        group.add_up(self.sums)
        binding = torch.stack((self.binding, self.binding.new_tensor(self.binding_steps)))
        group.add_up(binding)
        counts, hits, losses = self.sums.tolist()
        answers = slice(2, NUM_LABELS)
        out = {
            "text": losses[TEXT] / max(1, counts[TEXT]),
            "answer": sum(losses[answers]) / max(1, sum(counts[answers])),
            "acc": sum(hits[answers]) / max(1, sum(counts[answers])),
        }
        for at, slot in enumerate(SLOTS):
            label = 2 + 2 * at + (slot != "copy")
            if counts[label]:
                out[slot if slot == "copy" else slot + "*"] = hits[label] / counts[label]
        out |= {name: loss / steps for name, loss, steps in zip(("told", "seen"), *binding.tolist()) if steps}
        self.sums.zero_()
        self.binding.zero_()
        self.binding_steps = [0, 0]
        return out


def jumped_positions(rows: int, length: int, device: torch.device) -> torch.Tensor:
    """Positions [rows * length] with 1 to 8 jumps a row, within MAX_POSITIONS: distances longer than the row are met."""
    count = random.choice((1, 2, 4, 8))
    total = random.random() ** 2 * max(0, MAX_POSITIONS - length)
    jumps = torch.zeros(rows, length, device=device)
    jumps.scatter_add_(
        1,
        torch.randint(0, length, (rows, count), device=device),
        torch.rand(rows, count, device=device) * (total / count),
    )
    return (torch.arange(length, device=device) + jumps.cumsum(1).floor()).reshape(-1)


def weighted_loss(losses: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean loss of text plus weighted mean loss of answers."""
    text = (labels == TEXT).float()
    answer = (labels >= 2).float() * torch.where(labels % 2 == 1, FIRST_WEIGHT, 1.0)
    return (losses * text).sum() / text.sum().clamp(min=1) + (losses * answer).sum() / answer.sum().clamp(min=1)


def train(model: TinyModel, options: Options, name: str) -> None:
    """Trains, saves into options.out every so often and at the end, evaluates. The first of several processes saves and tells."""
    group = Group()
    first = group.rank == 0
    random.seed(options.seed)
    torch.manual_seed(options.seed + group.rank)
    device, cuda = model.device, model.device.type == "cuda"
    options.out.mkdir(parents=True, exist_ok=True)
    phase = multiprocessing.Value("i", 0)
    loader = torch.utils.data.DataLoader(
        Batches(options, phase, group.rank),
        batch_size=None,
        num_workers=options.workers,
        pin_memory=cuda,
        prefetch_factor=2 if options.workers else None,
    )
    batches = iter(loader)
    binding = Binding(model.config["hidden_size"], device) if options.binding else None
    trained = model.weights | ({"binding": binding.matrices} if binding else {})
    optimizer = Optimizer(trained, options.muon_rate, options.adam_rate)
    ends = np.cumsum([share for _, share in options.phases])
    statistics = Statistics(device)
    begun = time.time()
    start = None  # of the time that counts: compilation is over
    seconds, step, tokens_seen, waited = options.seconds, 0, 0, 0.0
    last_log, last_save = begun, 0.0  # a clock's time, and seconds of training
    saved = False

    def tell(text: str) -> None:
        if first:
            print(f"{name}: {text}", flush=True)

    tell(f"{model.num_parameters():,} parameters" + (f", {group.size} processes" if group.size > 1 else ""))
    while True:
        asked = time.time()
        tokens, labels, *bound = next(batches)
        now = time.time()
        waited += now - asked
        passed, log_now = group.from_first(
            now - start if start else 0.0, bool(start) and now - last_log > options.log_every
        )
        done = passed / seconds
        if done >= 1:
            break
        current = min(int(np.searchsorted(ends, done, side="right")), len(ends) - 1)
        phase.value = current
        tokens, labels = tokens.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        rows, length = tokens.shape[0], tokens.shape[1] - 1
        positions = jumped_positions(rows, length, device) if random.random() < options.jumps else None
        targets, labels = tokens[:, 1:].reshape(-1), labels[:, 1:].reshape(-1)
        extra, watch = [], None
        if binding:
            bound = [part.to(device, non_blocking=True) for part in bound]
            watch = binding.watcher(*bound, model.weights["model.embed_tokens.weight"], extra)
        losses, hits = model.losses(tokens[:, :-1].contiguous(), targets, positions, watch=watch)
        loss = weighted_loss(losses, labels) + options.binding * sum(extra)
        if extra:
            statistics.add_binding(extra, bound)
        loss.backward()
        group.average_gradients(optimizer.all)
        factor = min(1.0, (step + 1) / options.warmup) * min(1.0, max(0.02, (1 - done) / options.decay))
        optimizer.step(factor)
        statistics.add(labels, hits, losses.detach())
        step += 1
        tokens_seen += rows * length * group.size
        if start is None and step == 3:
            if cuda:
                torch.cuda.synchronize()
            start = time.time()
            if options.until:
                (seconds,) = group.from_first(min(seconds, options.until - start - options.eval_seconds - 10))
            if seconds <= 0:
                raise SystemExit(f"{name}: no time is left to train in; give a longer --wall or fewer --eval-seconds")
            tell(f"first steps took {start - begun:.1f} s; training for {seconds:.0f} s")
        if log_now:
            report = statistics.report(group)
            last_log = time.time()
            if first:
                memory = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
                line = {
                    "step": step,
                    "seconds": round(passed, 1),
                    "left": round(seconds - passed),
                    "lengths": options.phases[current][0],
                    "Mtokens": round(tokens_seen / 1e6, 1),
                    "rate": round(factor, 3),
                    "waited": round(waited, 1),
                    "GiB": round(memory, 1),
                }
                line |= {key: round(value, 4) for key, value in report.items()}
                tell(" ".join(f"{key} {value}" for key, value in line.items()).replace("[", "").replace("]", ""))
                with open(options.out / "train.jsonl", "a") as log:
                    log.write(json.dumps(line) + "\n")
            if not math.isfinite(report["text"] + report["answer"]):
                tell("the loss is not finite; back to the last checkpoint at half the rates")
                if not saved:
                    raise SystemExit(f"{name}: there is none yet; give a lower --rate")
                checkpoint.load(options.out, model.weights)
                if binding:
                    binding.reset()
                optimizer = Optimizer(trained, optimizer.muon.rate / 2, optimizer.adam_rate / 2)
            elif passed - last_save > options.save_every:
                if first:
                    checkpoint.save(options.out, model.config, model.weights, options.tokenizer)
                last_save, saved = passed, True
    if not all(bool(weight.isfinite().all()) for weight in model.weights.values()):
        raise SystemExit(
            f"{name}: the last weights are not finite; {options.out} keeps the checkpoint before them, if there is one"
        )
    if not first:
        return
    checkpoint.save(options.out, model.config, model.weights, options.tokenizer)
    tell(f"{step} steps, {tokens_seen / 1e6:.1f}M tokens, {time.time() - start:.0f} s; saved to {options.out}")
    del batches, loader, optimizer
    assess(model, options, name)


def assess(model: TinyModel, options: Options, name: str) -> None:
    """Evaluates the weights as a checkpoint has them; writes results.json."""
    checkpoint.round_weights(model.weights)
    pieces = Pieces(options.work, options.tokenizer, 77, held_out=True)
    seconds = options.eval_seconds
    if options.until:
        seconds = max(5.0, options.until - time.time() - 3)
    file = options.out / "results.json"
    results = evaluate.evaluate(model, pieces, options.eval_lengths, seconds, file)
    results["text"] = {
        "nats_per_token": round(
            evaluate.text_loss(model, pieces, min(4096, max(options.eval_lengths)), 4 * options.tokens), 4
        )
    }
    file.write_text(json.dumps(results, indent=1))
    (options.out / "results.md").write_text(evaluate.markdown(results))
    print(f"{name}: held-out text {results['text']['nats_per_token']:.3f} nats a token", flush=True)
