"""Files in, files out: which rows are scored together, how a file comes into being, what stands in its record.

A job is a list of *pieces*: a whole input file, or a range of its row groups where a few large files have to be spread over
several workers. A piece is written beside its place and renamed when it is whole; its record (rows, checksum, sums) is
written just before. So what is there is finished, and a job that was killed goes on with the pieces that are not. Pieces of
a file, and all files where `top` chooses rows, are put together at the end (`join`).

    OUTPUT/<relative path of the input>      the scored rows
    OUTPUT/_records/<relative path>.json     what was learned of them
    OUTPUT/_pieces/<relative path>/...       while a file is in pieces
    OUTPUT/_manifest.json                    written last

How rows are put into batches and row groups depends on the file alone: any number of workers writes the same bytes.

    inputs.py   what is asked, input files, pieces, batches        output.py   files that are whole or not there, records
    pieces.py   score a piece, join pieces                         job.py      a whole job
"""

from mtrec.scored_files.inputs import InputFile, Piece, Request
from mtrec.scored_files.job import Asked, score_files, score_here
from mtrec.scored_files.pieces import FileError, score_piece

__all__ = ["Asked", "FileError", "InputFile", "Piece", "Request", "score_files", "score_here", "score_piece"]
