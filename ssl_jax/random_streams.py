"""Random streams: the numbers that keys are folded with, one for each purpose, all in this file.

Two purposes that fold the same key with the same number draw the same values, and no test of either shows it. MoCo
once shuffled its keys by the same draw that set the area of their crops: batch norm's groups were sorted by area.

An example's key is a function of (seed, step, position in the global batch): `augment.example_keys`. View i folds
that key with i, and every other purpose with a number above every view's index.
"""

MASK = 2**16  # MAE: which patches are removed
SHUFFLE = 2**16 + 1  # MoCo v1, v2: the order in which keys are assigned to batch norm's groups (shuffling BN)
DROP_PATH = 2**16 + 2  # DINO: which examples skip which branch; folded with the view after that
QUEUE = 2**16 + 3  # MoCo v1, v2: the random rows that the queue starts with; folds the key of `init`
SLICES = 2**16 + 4  # LeJEPA: the directions of a step, the same for all examples and runs: a seed, folded with the step
BLOCKS = 2**16 + 5  # DINOv2: which crops are masked and their blocks; folded with the view after that
RAND_AUGMENT = 2**16 + 6  # what RandAugment does; it and the next fold a view's key
ERASE = 2**16 + 7  # random erasing: the box and its noise
BATCH = 2**31 - 1  # mixup and cutmix, drawn for a whole batch: in place of the position of an example, which none has

# The host's crops (`data.stream`) have NumPy generators, seeded by (seed, step, position, view, CROP). NumPy pads short
# seeds with zeros: without a last number, view 0 of position 0 would have the generator of an epoch's order.
CROP = 1
# The copies that `duplicates` makes of images have generators of (row, 0, 0, 0, ALTERED).
ALTERED = 2
