"""The run page: one run directory, watched in a browser (`dgpo ui RUN`).

Promises
- It reads and never writes: neither into the run directory nor into the queue, which it asks as an observer.
- Nothing is answered without the token, and nothing to a name that is not its own (access.py).
- What is asked again and again costs what is new: rows are read once for all clients, curves are thinned.
- What comes from prompts, scorers and errors reaches the page as text, never as markup.

    access.py       token, cookie, host, headers
    tail.py         metrics.jsonl as it grows, into columns.py
    charts.py       which curves there are, and their points
    gallery.py      kept groups by page, their images
    difference.py   two resolved configurations, key by key
    watch.py        looks at the run for everybody; stream.py tells them
    app.py          the routes
"""
