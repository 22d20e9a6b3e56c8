"""Gate analysis: record gate values, summarize them, report them and plot them."""
