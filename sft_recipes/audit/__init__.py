"""Quality of a data set: what is wrong with which rows, and the rows without it."""
