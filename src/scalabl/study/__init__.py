"""Methods x tasks x seeds from one recipe, cut into cells that are done once and kept.

study        the recipe: model, tasks, shifts, variants of methods, seeds; tasks, variants, grids: its parts (no torch)
tested       the sets that a task's runs are tested on                              (no torch)
cells        a cell: what it depends on, its address, whether it is finished        (no torch)
plan         a study as cells, and the entries of its table; grows by what is chosen (no torch)
work         one cell done: a training run, a fit, or predictions
run          all cells done, by one process, by several, or by a Ray cluster
results      the tidy table, a row an entry and data set; CSV and Parquet
summary      means over seeds, with paired comparisons
pooled       every method against plain LoRA over all tasks; frontier: the picture of NLL against cost
tried        the settings that were tried; detection: what tells errors and rows out of scope
page         tables and pictures as Markdown, LaTeX and HTML
pictures     of methods and of settings; look: their names and colours
benchmark    all of it, from the recipe to the tables
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
