"""The tasks by name."""

from collections.abc import Callable

from tasks.images import cells, cifar10, flowers, resnet20, resnet56
from tasks.records import mortality
from tasks.task import Batches, Task, batches_of
from tasks.text import clinc, clinc_few

TASKS: dict[str, Callable[[], Task]] = {
    "flowers": flowers,
    "cells": cells,
    "cifar10": cifar10,
    "clinc-10": clinc_few,
    "clinc": clinc,
    "mortality": mortality,
    "resnet20": resnet20,
    "resnet56": resnet56,
}
