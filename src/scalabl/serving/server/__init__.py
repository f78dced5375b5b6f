"""`scalabl serve`: adapters on one base model behind HTTP, in one process.

adapters.py      the named directories, loaded; the base's weights are there once
worker.py        the one thread that passes the model: what waits for the same adapter shares a batch
classify.py      rows -> the answers that `scalabl predict` writes
texts.py         prompts -> texts, a token at a time, each text under its own settings
completions.py   OpenAI's chat and text completions, their forms on the wire
limits.py        what a request may be and who may ask, before a byte of it is read as JSON
metrics.py       what Prometheus reads
app.py           the routes
run.py           a socket, the program's signals, and an end that answers what it took

FastAPI on uvicorn carries it, with the model in the server's own process. LitServe, which batches and streams too, runs
the model in worker processes and pickles what goes there and back, waits a set time for a batch to fill, and has no
bound on what waits; here a batch is what came while the one before was under way, so that a single client never waits
for others.
"""
