"""Evaluations on a suite of prompts: `dgpo eval MODEL --suite S`, and `dgpo compare A B` of two of them.

prompts.py        what there is to ask for: GenEval, quoted text, a file, a dataset, held-out prompts
written_text.py   prompts that ask for text in an image
settings.py       what an evaluation depends on; another one may not go on in its folder
folder.py         the folder: settings, one file a finished shard, contact sheets
run.py            shards over rollout workers, and what comes of them
sheet.py          contact sheets
statistics.py     means with standard errors over prompts; the bootstrap
summary.py        by reward and by tag, for people and as JSON
compare.py        paired differences of two evaluations
"""
