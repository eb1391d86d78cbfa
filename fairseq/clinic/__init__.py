"""The paper's measurements, on any model: why deep Post-LN fails to train, seen before and after training.

``dependency`` (how much a sub-layer depends on its own branch), ``stability`` (how far the output moves when the
parameters do), ``gradients``, ``check`` (a verdict on a training command) and ``omega``. Each module measures and
returns plain numbers; ``figures`` draws them, ``results`` keeps them, ``report`` puts all on one page.
"""
