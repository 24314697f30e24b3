"""Services over HTTP; starlette and uvicorn come with the extra `server`."""
