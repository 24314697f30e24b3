"""Programs that run inside the sandbox: a judge that runs tests, a server of the solution, and both in one process.

Nothing here imports the rest of the package, which sends the texts of these files along with each solution.
"""
