"""What every room needs and none owns: errors, files, progress, the processes of one command."""

__version__ = "0.2.0"
