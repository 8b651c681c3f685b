"""Distils a selector for a transformers model, in Python: for families that `spot distill` does not load too."""

import json
import math
import os
import pathlib
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from spotattention import arguments
from spotattention.hf import backbone
from spotattention.hf.calibrate import calibrate as fit_temperatures
from spotattention.hf.data import Data, TrainingData
from spotattention.hf.initialize import start_from_backbone
from spotattention.hf.loss import LayerParameters, layer_loss
from spotattention.hf.observe import Seen, observing, run
from spotattention.progress import Progress
from spotattention.rope import RopeConfig, RopeTable
from spotattention.selector import Selector, WeightFormat, weight_format
from spotattention.selector_config import SelectorConfig

# Settings that are no whole numbers.
_RATES = ("peak_lr", "final_lr", "constant_share", "weight_decay", "clip_norm")


def distill(
    model: nn.Module,
    data: Data,
    out: str | os.PathLike,
    *,
    tokenizer: Any = None,
    preset: str = "spot",
    config: SelectorConfig | None = None,
    steps: int = 763,
    sequence_length: int = 16384,
    sequences_per_step: int = 8,
    query_rows: int = 0,
    peak_lr: float = 1e-3,
    final_lr: float = 5e-5,
    warmup_steps: int = 100,
    constant_share: float = 0.3,
    weight_decay: float = 0.1,
    clip_norm: float = 1.0,
    held_out_every: int = 100,
    held_out_sequences: int = 4,
    calibrate: bool = True,
    seed: int = 42,
    store: torch.dtype | WeightFormat = torch.float32,
    progress: bool = True,
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> Selector:
    """Trains a selector for a frozen transformers model and writes its folder `out`, as `spot distill` does.

    model: decoder-only, with standard softmax attention in its full-context layers, which get a selector each; sliding-
    window and linear layers are left as they are. Its weights are not touched; float32 or bfloat16. data: text files or a
    folder of them (.txt, .jsonl with a field text, .gz of both), or an iterable of documents that can be read again:
    texts (with the model's tokenizer) or lists of token ids. config: the selector's shape and loss, else those of
    `preset` ("spot", "paper").

    The recipe is that of `spot distill` (docs/method.md): steps of sequences_per_step sequences of sequence_length
    tokens; AdamW (0.9, 0.95), the rate rising over warmup_steps (at most a fifth of the steps) to peak_lr, constant, then
    a cosine to final_lr; the loss on query_rows freshly drawn queries of each sequence (0: all). Temperatures,
    residual masses and the mass table are fitted on held-out documents at the end. `out` also gets metrics.jsonl, an object
    a step, which on_step is given too. The folder's W_q and W_k are stored as `store` says (Selector.save).

    Returns the selector; `attach` takes it or its folder, `spot` and the engine take the folder where they know the
    family. Raises ValueError in one sentence when the model's attention is of another kind, when settings are
    impossible, or when a loss is not finite.
    """
    for name, value in {"calibrate": calibrate, "progress": progress}.items():
        arguments.flag(f"distillation: {name}", value)
    arguments.path("out", out)
    weight_format(store, backbone.text_config(model).hidden_size, "distillation")
    run_ = _Run(
        model,
        config or SelectorConfig.from_preset(preset),
        out,
        steps=steps,
        sequence_length=sequence_length,
        sequences_per_step=sequences_per_step,
        query_rows=query_rows,
        peak_lr=peak_lr,
        final_lr=final_lr,
        warmup_steps=warmup_steps,
        constant_share=constant_share,
        weight_decay=weight_decay,
        clip_norm=clip_norm,
        held_out_every=held_out_every,
        held_out_sequences=held_out_sequences,
        seed=seed,
    )
    encode, end = None, backbone.text_config(model).eos_token_id
    if tokenizer is not None:
        encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
        end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else end
    if isinstance(end, list):
        end = end[0]
    if end is None:
        raise ValueError("neither tokenizer nor model names an end-of-text token, which separates documents")
    texts = TrainingData(data, encode, end, sequence_length, held_out_every, seed)
    held_out = texts.held_out(held_out_sequences) if held_out_sequences else []
    training = model.training
    model.eval()
    try:
        run_.start(texts)
        run_.train(texts, held_out, progress, on_step)
        fitted = fit_temperatures(model, run_.modules, run_.layers, held_out, progress) if calibrate else None
    finally:
        model.train(training)
    selector = run_.selector(fitted)
    selector.save(out, store)
    (pathlib.Path(out) / "README.md").write_text(_card(selector, pathlib.Path(out).name))
    return selector


def learning_rate(step: int, settings: dict[str, Any]) -> float:
    """Of step 0 .. steps - 1."""
    steps, peak, final = settings["steps"], settings["peak_lr"], settings["final_lr"]
    warmup = min(settings["warmup_steps"], steps // 5)
    if step < warmup:
        return peak * (step + 1) / warmup
    decay_start = min(warmup + math.floor(settings["constant_share"] * steps + 0.5), steps)
    if step < decay_start:
        return peak
    last = steps - 1  # which gets final_lr exactly
    done = (step - decay_start) / (last - decay_start) if last > decay_start else 1.0
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * done))


class _Run:
    def __init__(self, model: nn.Module, config: SelectorConfig, out: str | os.PathLike, **settings: Any) -> None:
        config.validate("selector config")
        learned = config.distillation
        if learned.rest_bucket or learned.teacher != "token" or config.per != "layer":
            raise ValueError(
                "distilling in Python knows the dense and the sparse loss of a token teacher, one set a layer; `spot "
                "distill` has rest_bucket, block_max and per kv_group"
            )
        _check(settings, config, backbone.text_config(model))
        self.out = pathlib.Path(out)
        if (self.out / "selector.json").exists():
            raise ValueError(f"{self.out} already holds a selector; choose another folder")
        self.model, self.settings, self.steps_done = model, settings, 0
        self.facts = backbone.facts(model)
        named = getattr(model.config, "architectures", None) or self.facts["architecture"]
        self.facts["architecture"] = named[0]
        left_out = config.selection.dense_layers
        self.modules = {i: m for i, m in backbone.full_attention(model).items() if i not in left_out}
        if not self.modules:
            raise ValueError("selection.dense_layers leaves no full-attention layer for a selector")
        self.config = replace(
            config, selection=replace(config.selection, temperature=[], residual_mass=[], mass_table=[])
        )
        rope = (
            RopeTable(RopeConfig.of_model(backbone.text_config(model)), config.rope_dims) if config.rope_dims else None
        )
        generator = torch.Generator().manual_seed(settings["seed"])
        self.layers = {
            i: LayerParameters(self.config, self.facts["hidden_size"], rope, generator).to(next(m.parameters()).device)
            for i, m in self.modules.items()
        }
        self.last: dict[str, Any] = {}

    def start(self, texts: TrainingData) -> None:
        """The weights before the first step."""
        if self.config.distillation.start != "backbone":
            return
        needed = 8 * self.facts["hidden_size"]
        own = TrainingData(texts.data, texts.encode, texts.end, texts.length, texts.held_out_every, texts.seed)
        sequences = [own.next() for _ in range(-(-needed // texts.length))]
        if not start_from_backbone(self.model, self.modules, self.layers, sequences):
            self.config.distillation.start = "random"  # as the selector will say

    def train(
        self, texts: TrainingData, held_out: list[Tensor], shown: bool, on_step: Callable[[dict[str, Any]], None] | None
    ) -> None:
        s = self.settings
        parameters = [p for layer in self.layers.values() for p in layer.parameters()]
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": s["weight_decay"]},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=s["peak_lr"], betas=(0.9, 0.95), eps=1e-8)
        rows_of = torch.Generator().manual_seed(s["seed"] + 1)
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / "metrics.jsonl").open("w") as log, Progress("Distilling", s["steps"], shown) as bar:
            for step in range(s["steps"]):
                begun = time.monotonic()
                rate = learning_rate(step, s)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.zero_grad()
                metrics = self._pass([texts.next() for _ in range(s["sequences_per_step"])], rows_of)
                norm = float(nn.utils.clip_grad_norm_(parameters, s["clip_norm"] or math.inf))
                bad = [
                    i for i, loss in zip(self.layers, metrics["loss_per_layer"], strict=True) if not math.isfinite(loss)
                ]
                if bad or not math.isfinite(norm):
                    what = f"the loss of layer {bad[0]}" if bad else "the gradient"
                    raise ValueError(
                        f"step {step + 1}: {what} is not finite; lower peak_lr, or run the model in float32 or bfloat16"
                    )
                optimizer.step()
                seconds = time.monotonic() - begun
                tokens = s["sequences_per_step"] * s["sequence_length"]
                metrics |= {"step": step + 1, "lr": rate, "grad_norm": norm, "epoch": texts.epoch}
                metrics |= {"tokens": (step + 1) * tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}
                if held_out and (step in (0, s["steps"] - 1) or (step + 1) % 50 == 0):
                    measured = self._pass(held_out, None)
                    metrics |= {f"held_out_{name}": value for name, value in measured.items() if name != "layers"}
                self.last, self.steps_done = metrics, step + 1
                log.write(json.dumps(metrics) + "\n")
                log.flush()
                bar.update(step + 1, f"loss {metrics['loss']:.4f}, {metrics['tokens_per_second']:.0f} tokens/s")
                if on_step is not None:
                    on_step(metrics)

    def _pass(self, sequences: list[Tensor], rows_of: torch.Generator | None) -> dict[str, Any]:
        """Forward passes with each layer's loss; with a generator its gradient too, on rows that it draws."""
        sums = {layer: [0.0, 0.0] for layer in self.layers}
        length, wanted = self.settings["sequence_length"], self.settings["query_rows"]
        rows: Tensor | None = None

        def look(seen: Seen) -> None:
            chosen = None if rows is None else rows.to(seen.hidden.device)
            weight = 1 / len(sequences) if rows_of is not None else 0.0
            loss, entropy, _ = layer_loss(self.layers[seen.layer], seen, chosen, weight)
            sums[seen.layer][0] += loss / len(sequences)
            sums[seen.layer][1] += entropy / len(sequences)

        with observing(self.model, self.modules, look):
            for tokens in sequences:
                if rows_of is not None and 0 < wanted < length:
                    rows = torch.randperm(length, generator=rows_of)[:wanted].sort().values
                run(self.model, tokens)
        made: dict[str, Any] = {"layers": list(self.layers)}
        for index, name in enumerate(("loss", "teacher_entropy")):
            values = [sums[layer][index] for layer in self.layers]
            made |= {name: sum(values) / len(values), f"{name}_per_layer": values}
        return made

    def selector(self, fitted: dict[str, Any] | None) -> Selector:
        notes: dict[str, Any] = {"steps": self.steps_done, "tokens": self.last["tokens"], "loss": self.last["loss"]}
        notes["training"] = {k: v for k, v in self.settings.items()}
        if "held_out_loss" in self.last:
            notes["held_out_loss"] = self.last["held_out_loss"]
        if fitted is not None:
            chosen = self.config.selection
            chosen.temperature, chosen.residual_mass = fitted["temperature"], fitted["residual_mass"]
            chosen.mass_table, notes["mass_calibration"] = fitted.pop("mass_table"), fitted.pop("mass_calibration")
            notes["calibration"] = fitted
        weights = {i: layer.weights() for i, layer in self.layers.items()}
        return Selector(self.config, self.facts, list(self.layers), weights, notes)


def _check(settings: dict[str, Any], config: SelectorConfig, model_config: Any) -> None:
    def require(holds: bool, name: str, wanted: str) -> None:
        if not holds:
            raise ValueError(f"distillation: {name} is {settings[name]}; it must be {wanted}")

    for name in settings:
        check = arguments.number if name in _RATES else arguments.whole
        settings[name] = check(f"distillation: {name}", settings[name])
    for name in ("steps", "sequences_per_step"):
        require(settings[name] >= 1, name, "at least 1")
    length = settings["sequence_length"]
    positions = getattr(model_config, "max_position_embeddings", None) or length
    require(2 <= length <= positions, "sequence_length", f"2 to the model's {positions} positions")
    require(0 <= settings["query_rows"] <= length, "query_rows", "0 (all) to sequence_length")
    require(0 < settings["peak_lr"], "peak_lr", "positive")
    require(0 <= settings["final_lr"] <= settings["peak_lr"], "final_lr", "0 to peak_lr")
    require(settings["warmup_steps"] >= 0, "warmup_steps", "0 or more")
    require(0 <= settings["constant_share"] <= 1, "constant_share", "0 to 1")
    for name in ("weight_decay", "clip_norm", "held_out_sequences"):
        require(settings[name] >= 0, name, "0 or more")
    require(settings["held_out_every"] == 0 or settings["held_out_every"] >= 2, "held_out_every", "0 or at least 2")
    least = config.selection.sinks + config.selection.recency + 32
    if config.distillation.teacher_scope == "residual" and length < least:
        raise ValueError(
            f"distillation: of {length} tokens the first {config.selection.sinks} and the last {config.selection.recency} "
            f"are left out, nothing remains to learn; give sequences of {least} or more, or teacher_scope all"
        )


def _card(selector: Selector, name: str) -> str:
    facts, notes, config = selector.backbone, selector.notes, selector.config
    training = notes["training"]
    lines = [
        f"# {name}",
        "",
        f"A SpotAttention selector for one checkpoint: {facts['architecture']} with {facts['num_layers']} layers, hidden "
        f"size {facts['hidden_size']} and {facts['num_heads']} query heads on {facts['num_kv_heads']} KV heads of "
        f"{facts['head_dim']} (fingerprint {facts['fingerprint'] or 'unknown'}).",
        "",
        f"Distilled by spotattention.distill: {notes['steps']} steps of {training['sequences_per_step']} x "
        f"{training['sequence_length']} tokens, preset {config.preset}, loss {notes['loss']:.4f} nats in the last step"
        + (f", {notes['held_out_loss']:.4f} held out." if "held_out_loss" in notes else "."),
        "",
        "```python",
        f'spotattention.attach(model, "{name}", "spot:p={config.selection.p:g}")',
        "```",
        "",
    ]
    if "calibration" not in notes:
        lines += ["Its temperatures are not fitted: p is the selector's own estimate, not captured mass.", ""]
    if config.selection.mass_table:
        lines += _mass_section(config.selection.mass_table, notes["mass_calibration"])
    return "\n".join(lines)


def _mass_section(table: list[list[float]], source: dict[str, Any]) -> list[str]:
    """Lines of a card, as src/distill/card.cpp writes them: every second row."""
    return [
        "## What a captured mass reads",
        "",
        f"`m=M` takes the threshold T that captured the share M of all attention in the last quarter of {source['contexts']} "
        f"held-out contexts of {source['length']:,} tokens; `t=T` takes the blocks that hold at least T of it, by the selector's estimate and the mean "
        "residual mass of each layer and set. Mean over layers:",
        "",
        "| T | captured mass | share of the tokens |",
        "| --- | --- | --- |",
        *(f"| {threshold:.2g} | {mass:.3f} | {100 * tokens:.1f}% |" for threshold, mass, tokens in table[::2]),
        "",
    ]
