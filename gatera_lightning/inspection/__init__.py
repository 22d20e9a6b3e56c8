"""Looking at gates: values of any adapted model, statistics of many, pictures, and a page to send to a colleague."""
