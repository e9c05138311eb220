"""What each process of torchrun does in test_vllm_ranks.py: a sharded policy, and an engine that samples for it.

torchrun --nproc-per-node 2 tests/vllm/sharded_rollouts.py MODEL TENSOR_PARALLEL RESULT
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from repirl.batch import pack
from repirl.distributed.load import load_sharded_model
from repirl.distributed.world import World
from repirl.learner import Learner
from repirl.options import OptimizerConfig, VLLMConfig
from repirl.rollout import vllm_worker
from repirl.rollout.engine import EngineError, Sampling
from repirl.rollout.vllm import VLLMEngine

PROMPTS = [[(7 * i + 3 * j) % 250 + 2 for j in range(n)] for i, n in enumerate((40, 5, 75, 12, 33))]


def sample(world: World, model_path: str, tensor_parallel: int) -> dict:
    rank = world.rank
    options = {"kind": "causal", "dtype": torch.float32, "compute_dtype": torch.float32}
    model = load_sharded_model(model_path, **options, world=world)
    policy = Learner(model, OptimizerConfig(), num_updates=1, tokens_per_microbatch=4096, world=world)
    engine = VLLMEngine(
        model.config,
        VLLMConfig(kv_cache_gib=1 / 64, tensor_parallel=tensor_parallel),
        dtype=torch.float32,
        max_model_len=128,
        max_sequences=8,
        block_size=32,
    )
    engine.update_weights(policy)
    generator = torch.Generator().manual_seed(rank)
    with torch.no_grad():
        for parameter in model.parameters():
            local = parameter.to_local()
            local += 0.02 * torch.randn(local.shape, generator=generator)

    # Only one process drops a tensor; all of them must raise the error.
    load, problem = vllm_worker.load_weights, ""
    if rank == 1:
        dropped = "model.layers.0.mlp.gate_proj.weight"
        vllm_worker.load_weights = lambda worker, weights: load(worker, (w for w in weights if w[0] != dropped))
    try:
        engine.update_weights(policy)
    except EngineError as error:
        problem = str(error)
    vllm_worker.load_weights = load

    engine.update_weights(policy)
    # Uneven shares, of which one may be empty.
    mine = [i for i in range(len(PROMPTS)) if (i < 4) == (rank == 0)]
    sampling = Sampling(10, 0.9, (1,))
    own = engine.generate([PROMPTS[i] for i in mine], [100 + i for i in mine], sampling)
    nothing = engine.generate([] if rank else PROMPTS[:1], [] if rank else [100], sampling)
    responses = world.gather(own)
    logprobs = policy.score(pack([(p, r.token_ids) for p, r in zip(PROMPTS, responses, strict=True)]), 0.9)["logprob"]
    sampled = torch.tensor([x for r in responses for x in r.logprobs])
    report = {
        "difference": float((logprobs - sampled).abs().max()),
        "problem": problem,
        "lengths": [len(r.token_ids) for r in responses],
        "num_first": len(nothing),
        "environment": {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")},
    }
    engine.close()
    return report


def main(result: Path, tensor_parallel: int, model_paths: list[str]) -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    world = World(torch.device("cpu"), rank, size, init_device_mesh("cpu", (size,), mesh_dim_names=("shard",)))
    reports = world.gather([[sample(world, path, tensor_parallel) for path in model_paths]])
    if rank == 0:
        result.write_text(json.dumps(reports))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
    # gloo's threads may abort an interpreter that exits.
    os._exit(0)
