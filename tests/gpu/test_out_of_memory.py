"""On a real GPU: memory runs out in a step, and the update is the same in smaller passes."""

import gc

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.families import tiny_tokenizer
from data_prep import UserError
from finetune.notebooks import run_cells

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU with CUDA on this machine"),
]
OVERRIDES = {
    "source": "sample",
    "train_rows": 256,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 64,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": "off",
    "lr_scheduler_type": "constant",
}


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    """Random weights; a batch of 64 articles leaves some hundred megabytes of activations."""
    folder, tokenizer = tmp_path_factory.mktemp("wide-model"), tiny_tokenizer()
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id, **shape
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trainer_of(run, overrides):
    return run_cells(f"fine_tuning_{run}", "trainer.train(", PROFILE="gpu", OVERRIDES=overrides)["trainer"]


def gradients(trainer):
    """Those of two updates, and the highest memory of their passes above what stood before."""
    seen, clip = [], trainer._clip_grad_norm

    def noted(model):
        seen.append(torch.cat([parameter.grad.float().flatten() for parameter in trainer._trained]).cpu())
        return clip(model)

    trainer._clip_grad_norm = noted
    trainer.args.max_steps = 2
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    return seen, before, torch.cuda.max_memory_reserved()


def release():
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize(("run", "graphs"), [("full", False), ("lora", False), ("lora", True)])
def test_the_update_is_the_same_in_smaller_passes(run, graphs, wide_model, home):
    overrides = OVERRIDES | {"model": str(wide_model), "cuda_graphs": graphs}
    trainer = trainer_of(run, overrides)
    expected, before, peak = gradients(trainer)
    assert trainer.portions.largest is None
    del trainer
    release()

    trainer = trainer_of(run, overrides)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((before + 0.6 * (peak - before)) / total)
    try:
        found, *_ = gradients(trainer)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    print(trainer.portions.note)
    assert trainer.portions.largest < 64
    for one, other in zip(found, expected, strict=True):
        assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.995
        assert one.norm().item() == pytest.approx(other.norm().item(), rel=2e-2)
    del trainer
    release()


def test_one_article_that_does_not_fit_ends_the_training_in_a_sentence(wide_model, home):
    trainer = trainer_of("lora", OVERRIDES | {"model": str(wide_model), "cuda_graphs": False})
    release()
    total = torch.cuda.get_device_properties(0).total_memory
    # Enough for small tensors, which share 2 MB.
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 6e6) / total)
    try:
        with pytest.raises(UserError, match="one article does not fit"):
            trainer.train()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        del trainer
        release()
