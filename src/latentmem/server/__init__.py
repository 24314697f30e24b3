"""What is served over HTTP; starlette and uvicorn come with the extra `server`."""
