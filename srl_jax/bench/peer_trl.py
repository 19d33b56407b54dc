"""TRL's `GRPOTrainer`, its own loop, generation and training step, with the gate in its hooks."""

import tempfile
from pathlib import Path

import datasets
import transformers
import trl

from srl_jax.bench.peer_hf import device_memory, load, lora
from srl_jax.bench.worker import Gate
from srl_jax.bench.workload import Workload, advantages, prompts


class _Instrumented(trl.GRPOTrainer):
    """Prompts are given as ids, so that lengths are exact; everything else is TRL's."""

    gate: Gate
    prompt_ids: list[list[int]]

    def _tokenize_prompts(self, prompts):
        return [self.prompt_ids[int(prompt)] for prompt in prompts], None, {}

    def _generate_single_turn(self, *args, **kwargs):
        part = self.gate.begin("rollout")
        completions, logprobs = super()._generate_single_turn(*args, **kwargs)
        part.tokens = sum(map(len, completions))
        self.gate.end()
        self.gate.begin("update")  # reference log-probs, rewards, all micro-batches and the optimiser step
        return completions, logprobs


class _EndOfStep(transformers.TrainerCallback):
    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def on_step_end(self, args, state, control, **kwargs):
        self._gate.end(device_memory())


def run(gate: Gate, workload: Workload, directory: Path) -> None:
    transformers.logging.set_verbosity_error()
    gains = advantages(workload)[0].tolist()

    def reward(completions, **_):
        return [gains[i % len(gains)] for i in range(len(completions))]

    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = trl.GRPOConfig(
            output_dir=scratch,
            per_device_train_batch_size=workload.micro_batch,
            gradient_accumulation_steps=workload.rows // workload.micro_batch,
            num_generations=workload.group_size,
            max_completion_length=workload.new_tokens,
            generation_kwargs={"min_new_tokens": workload.new_tokens},
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            beta=0.04,
            learning_rate=1e-5,
            max_steps=1_000_000,
            use_cpu=not _cuda(),
            bf16=workload.dtype == "bfloat16",
            gradient_checkpointing=False,
            shuffle_dataset=False,
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = _Instrumented(
            model=load(workload, directory),
            reward_funcs=reward,
            args=arguments,
            train_dataset=datasets.Dataset.from_dict({"prompt": [str(i) for i in range(workload.prompts)]}),
            processing_class=tokenizer,
            peft_config=lora(workload),
            callbacks=[_EndOfStep(gate)],
        )
        trainer.gate, trainer.prompt_ids = gate, prompts(workload, directory).tolist()
        trainer.train()


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()
