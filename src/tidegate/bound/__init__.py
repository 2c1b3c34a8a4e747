"""What a trace asks of a fleet, and the rate above which no schedule can serve it."""
