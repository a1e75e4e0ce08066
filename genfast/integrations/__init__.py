"""genfast inside other libraries; each module here imports its library, so none is imported with genfast."""
