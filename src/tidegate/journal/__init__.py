"""The journal of a run: the schema of its lines, the writer and the reader."""

from tidegate.journal.reader import Journal, JournalLines, read_journal
from tidegate.journal.writer import JournalWriter

__all__ = ["Journal", "JournalLines", "JournalWriter", "read_journal"]
