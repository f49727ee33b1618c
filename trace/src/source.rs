//! Where a reader's bytes come from.
//!
//! Files are read with positioned reads, finished ones too. A memory map was tried on paper and lost: a file that is cut while it is mapped
//! (somebody records over it) kills the reader with SIGBUS, and asking for the file's length before every access only narrows the
//! gap, because a column is decompressed for milliseconds after the question. Copying the bytes out first would close the gap, but that is what a
//! positioned read is: one copy out of the page cache, about 30 us for a block whose decoding takes a
//! millisecond. So a cut is an error here, always, and this crate needs no `unsafe`.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::bytes::len64;
use crate::error::{Corrupt, TraceError};

/// Bytes of a trace.
#[derive(Debug)]
pub(crate) enum Source {
    File {
        file: File,
        path: PathBuf,
        /// The greatest length seen.
        longest: AtomicU64,
    },
    Bytes(Vec<u8>),
}

impl Source {
    pub(crate) fn open(path: &Path) -> Result<Self, TraceError> {
        let failed = |source| TraceError::Io {
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(failed)?;
        if file.metadata().map_err(failed)?.is_dir() {
            return Err(failed(std::io::Error::from(
                std::io::ErrorKind::IsADirectory,
            )));
        }
        Ok(Self::File {
            file,
            path: path.to_owned(),
            longest: AtomicU64::new(0),
        })
    }

    /// The length now.
    pub(crate) fn length(&self) -> Result<u64, TraceError> {
        match self {
            Self::File {
                file,
                path,
                longest,
            } => {
                let length = file
                    .metadata()
                    .map_err(|source| TraceError::Io {
                        path: path.clone(),
                        source,
                    })?
                    .len();
                longest.fetch_max(length, Ordering::Relaxed);
                Ok(length)
            }
            Self::Bytes(bytes) => Ok(len64(bytes.len())),
        }
    }

    /// Reads exactly so many bytes. They are compared with the file's length before memory is taken for them.
    pub(crate) fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>, TraceError> {
        let file_bytes = self.length()?;
        if offset
            .checked_add(len64(length))
            .is_none_or(|end| end > file_bytes)
        {
            return Err(self.missing(offset, file_bytes));
        }
        match self {
            Self::Bytes(bytes) => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX);
                let found = bytes.get(start..).and_then(|b| b.get(..length));
                found
                    .map(<[u8]>::to_vec)
                    .ok_or_else(|| self.missing(offset, file_bytes))
            }
            Self::File { file, path, .. } => {
                let mut out = vec![0; length];
                match file.read_exact_at(&mut out, offset) {
                    Ok(()) => Ok(out),
                    Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
                        Err(TraceError::Cut {
                            offset,
                            file_bytes: self.length()?,
                        })
                    }
                    Err(source) => Err(TraceError::Io {
                        path: path.clone(),
                        source,
                    }),
                }
            }
        }
    }

    /// Why bytes are not there: the file has become shorter, or it names bytes that it never had.
    fn missing(&self, offset: u64, file_bytes: u64) -> TraceError {
        match self {
            Self::File { longest, .. } if longest.load(Ordering::Relaxed) > file_bytes => {
                TraceError::Cut { offset, file_bytes }
            }
            _ => Corrupt::from(format!(
                "bytes are named that the file of {file_bytes} bytes does not have"
            ))
            .at(offset),
        }
    }
}
