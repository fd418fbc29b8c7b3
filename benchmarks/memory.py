"""How much memory one step of PPO-Lagrangian takes with five reward members and a cost model, in two layouts.

python benchmarks/memory.py

One backbone: policy, reference, critics and the six value models are adapters and heads on one base. Separate models,
as in Safe RLHF: policy, reference, a critic of the reward, a critic of the cost and the six value models are whole
models; policy and critics learn in full. Same base, same data, same steps, each layout in a process of its own: peak
resident memory above what the imports take, and the ratio. Nothing is asserted.

Twice: with the C library's habits, which keep freed memory and so have what came before in every peak, and with
`MALLOC_MMAP_THRESHOLD_`, under which large blocks go back when they are freed: what is held at one time, which costs
time.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LAYOUTS = ("one_backbone", "separate_models")
ALLOCATORS: dict[str, dict[str, str]] = {"kept": {}, "given back": {"MALLOC_MMAP_THRESHOLD_": str(2**18)}}
MEMBERS = 5
RANK = 16


def make(folder: Path, hidden: int, layers: int) -> int:
    """The base, and value models of both kinds on it; returns the number of parameters of the base."""
    import torch
    import transformers

    from rlhf_lab.engine.backbone import Lora
    from rlhf_lab.engine.model_paths import Adapters
    from rlhf_lab.engine.models import Calibration, new_scorer, save_model
    from rlhf_lab.engine.tiny import tiny_tokenizer

    tokenizer: Any = tiny_tokenizer()
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=8 * hidden // 3, num_hidden_layers=layers,
            num_attention_heads=8, max_position_embeddings=128, tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    lora = Lora(rank=RANK, alpha=2 * RANK, dropout=0.0, target_modules="all-linear", layers_to_transform=None)
    kinds = {"one_backbone": Adapters(lora=lora, quantise=None, frozen_layers=0.0), "separate_models": None}
    calibration = Calibration(method="gold", fitted_on="nothing")
    for layout, adapters in kinds.items():
        for k in range(MEMBERS + 1):
            scorer = new_scorer(
                str(folder / "base"), device=torch.device("cpu"), dtype="float32", seed=k, adapters=adapters
            )
            with torch.no_grad():
                for parameter in scorer.parameters():  # no two alike, as after training
                    parameter += 1e-3 * torch.randn_like(parameter)
            (folder / layout).mkdir(exist_ok=True)
            save_model(folder / layout / str(k), scorer, tokenizer, calibration)
    return sum(parameter.numel() for parameter in base.parameters())


def separate_critics(path: str, names: tuple[str, ...], **options: Any) -> Any:
    """One whole model for each critic, put together so that they are called as one."""
    import torch
    from torch import nn

    from rlhf_lab.engine.critics import Critics, load_critics

    class Trunks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunks: Any = nn.ModuleList(load_critics(path, (name,), **options).trunk for name in names)
            self.config, self.dtype, self.device = self.trunks[0].config, torch.float32, options["device"]

        @property
        def base_model(self) -> "Trunks":
            return self

        def get_input_embeddings(self) -> nn.Module:
            return nn.Embedding(1, len(names) * self.config.hidden_size)

        def forward(self, **inputs: Any) -> Any:
            said = [trunk(**inputs) for trunk in self.trunks]
            said[0].last_hidden_state = torch.cat([one.last_hidden_state for one in said], -1)
            return said[0]

    return Critics(Trunks(), names).to(options["device"]).eval()  # pyright: ignore[reportArgumentType]  it quacks


def resident_mib() -> float:
    """Now, of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def step(folder: Path, layout: str, quantise: str | None, tokens_at_once: int) -> dict[str, float]:
    """Peak memory of two steps above the imports, in MiB, by a run like any other."""
    import peft
    import scipy.stats  # noqa: F401  so that nothing large is left to be imported
    from hydra import compose, initialize_config_dir

    from rlhf_lab.engine import high_water
    from rlhf_lab.launch import compose as composing
    from rlhf_lab.launch.execute import execute
    from rlhf_lab.stages import train_online

    assert peft
    if quantise:
        import bitsandbytes  # noqa: F401
    models = [str(folder / layout / str(k)) for k in range(MEMBERS + 1)]
    overrides = [
        "algorithm=ppo_lag", "reward=ensemble_uwo", "model=hf", f"model.base={folder / 'base'}",
        f"scorers.reward_models=[{','.join(models[:MEMBERS])}]", f"scorers.cost_models=[{models[MEMBERS]}]",
        "stage.steps=2", "stage.prompts_per_step=16", "learner.minibatch_size=16", "sampling.max_new_tokens=16",
        "dataset.train_size=64", "dataset.eval_splits=[test]",
        "dataset.eval_size=4", "stage.checkpoint_every=2", f"learner.tokens_at_once={tokens_at_once}",
        f"runs_dir={folder / 'runs'}", f"name={layout}_{quantise}",
    ]  # fmt: skip
    if layout == "one_backbone":
        overrides += ["model.peft=lora", f"model.lora.rank={RANK}", f"model.quantise={quantise or 'null'}"]
    else:
        train_online.load_critics = separate_critics
    os.environ["RLHF_LAB_ROOT"] = str(composing.ROOT)  # where conf/config.yaml finds experiments/
    composing.register_resolvers()
    with initialize_config_dir(str(composing.ROOT / "conf"), version_base="1.3"):
        config = compose("config", overrides=overrides)
    plan = composing.plan_run(config, overrides, {"algorithm": "ppo_lag", "reward": "ensemble_uwo"})
    before = resident_mib()
    execute(plan)
    return {"imports": before, "peak": high_water.since_begin()[0] - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512, help="width of the base")
    parser.add_argument("--layers", type=int, default=8, help="of the base")
    parser.add_argument("--tokens-at-once", type=int, default=512, help="of a microbatch")
    parser.add_argument("--quantise", choices=["nf4", "int8"], help="of the one backbone")
    parser.add_argument("--layout", choices=LAYOUTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.layout:
        found = step(asked.folder, asked.layout, asked.quantise, asked.tokens_at_once)
        (asked.folder / f"{asked.layout}.json").write_text(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        size = make(folder, asked.hidden, asked.layers)
        print(f"base: {size / 1e6:.1f} M parameters, {size * 4 / 2**20:.0f} MiB in float32; rank {RANK}")
        for freed, settings in ALLOCATORS.items():
            peaks: dict[str, float] = {}
            for layout in LAYOUTS:
                quantise = ["--quantise", asked.quantise] if asked.quantise and layout == "one_backbone" else []
                command = [sys.executable, __file__, "--layout", layout, "--folder", place, *quantise]
                command += ["--tokens-at-once", str(asked.tokens_at_once)]
                shutil.rmtree(folder / "runs", ignore_errors=True)
                subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, **settings})
                found = json.loads((folder / f"{layout}.json").read_text())
                peaks[layout] = found["peak"]
                told = f"{found['peak']:8.0f} MiB above imports ({found['imports']:.0f} MiB); freed memory {freed}"
                print(f"{layout:16} {told}", flush=True)
            print(f"ratio            {peaks['one_backbone'] / peaks['separate_models']:8.2f}", flush=True)


if __name__ == "__main__":
    main()
