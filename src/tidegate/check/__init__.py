"""What a fleet of vLLM servers can do, proved before traffic does."""
