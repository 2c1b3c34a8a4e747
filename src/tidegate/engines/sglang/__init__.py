"""Experimental adapter for SGLang servers that are split by role; never run against a real one."""
