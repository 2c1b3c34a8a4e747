"""Experimental adapter for SGLang servers with prefill-decode disaggregation; never run against a real one."""
