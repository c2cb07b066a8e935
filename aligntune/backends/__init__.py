"""The backends: engines that build a trainer for a job."""
