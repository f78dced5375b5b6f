"""What is compared: the methods behind one interface (`scalabl.runs.method`), found by name."""
