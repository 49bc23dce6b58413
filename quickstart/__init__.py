"""The quickstart tasks, small enough for two CPU cores: render a four-character word as an image, and, in
`shapes`, draw coloured shapes as asked for.

Holds the prompt spaces, the ground-truth renderers, the diversity measures and the pretraining of the base
models. Nothing in the services imports more than `words`, `shapes.requests` and `diversity`; `pretrain` is
run once by hand for each model.
"""
