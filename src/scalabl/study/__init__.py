"""Methods x tasks x seeds from one recipe, cut into cells that are done once and kept.

study        the recipe: model, tasks, shifts, variants of methods, seeds          (no torch)
cells        a cell: what it depends on, its address, whether it is finished        (no torch)
plan         a study as cells, and the entries of its table                         (no torch)
work         one cell done: a training run, a fit, or predictions
run          all cells done, by one process, by several, or by a Ray cluster
results      the tidy table, a row an entry and data set; CSV and Parquet
compare      paired bootstrap over rows and seeds, intervals over seeds
summary, render    the table of means as Markdown, LaTeX and HTML
"""
