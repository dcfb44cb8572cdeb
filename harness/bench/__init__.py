"""`dpft bench`: step time and peak memory of the engines and their peers, side by side."""
