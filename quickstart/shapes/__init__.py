"""The shapes task: coloured shapes on 32 x 32 images, asked for as GenEval asks for objects.

`combinations` says what is held out, `requests` what is asked for, `render` draws it, `task` hands both to
the pretraining. Nothing in the services imports more than `requests`.
"""
