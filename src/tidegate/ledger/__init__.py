"""The one book of what is where: events in, Snapshot out."""
