"""Checkpoints that survive a kill at any moment, and go on with any number of processes.

A checkpoint is a folder `step_N`: tensors by torch.distributed.checkpoint (sharded, loaded into whatever sharding
there is), `run.pt` for the rest of the run's state, `trainer.json` for what people read, each model's configuration
and tokenizer, and `manifest.json` with every file's size and checksum. It is written as `step_N.tmp`, flushed to disk
and renamed, and only then are older ones pruned: whatever happens, the last complete one stays.
"""
