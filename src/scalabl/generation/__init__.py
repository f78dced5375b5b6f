"""Open-ended answers: text from the average over particles, and a confidence that predicts whether it is wrong."""
