"""The quickstart task: render a four-character word as an image, small enough for two CPU cores.

Holds the prompt space, the ground-truth renderer, the diversity measures and the pretraining of the base
model. Nothing in the services imports more than `words` and `diversity`; `pretrain` is run once by hand.
"""
