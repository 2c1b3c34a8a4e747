"""Learning how many tokens a request still has to go: prompts, collection, training, evaluation."""
