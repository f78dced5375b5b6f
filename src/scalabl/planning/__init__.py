"""What a training takes, before its weights are read: memory by part, operations, the largest batch. Imports no torch.

    configuration -> the adapted model on the meta device -> a step of it there -> bytes alive and operations

`plan` has the figures, `training_run` those of a run that is about to begin; `memory` says what there is.
"""
