"""Each wire has what a body may contain (schemas), what it asks (parse) and how it is answered (render).

A route is these three and a few lines that call them. What only one wire says stays in its files: the service
takes an `Ask` and gives a `Batch`.
"""
