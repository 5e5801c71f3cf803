"""How operations of a step are named in compiled programs, where autodiff's own names may be lost."""

BACKWARD = "backward"
# within it, of weight gradients that were put off
WEIGHT = "weight"
# of a forward and a backward that go through their layers together
PAIRED = "paired"
