"""From a snapshot to a run of checkpoints: data order, DeepSpeed loop, checkpoints, supervisor."""
