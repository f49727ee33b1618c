//! Files of `/proc` that are read again and again.
//!
//! At ten rounds per second opening a file costs as much as reading it, and a parser for all that stands in it costs
//! more than both. So files stay open, and what is wanted is looked up in the text.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// More than is looked at: of the files here the first lines.
const BYTES: usize = 4096;

pub(super) struct ProcFile {
    file: File,
    text: Box<[u8; BYTES]>,
}

impl ProcFile {
    pub(super) fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        Ok(Self {
            file: File::open(path)?,
            text: Box::new([0; BYTES]),
        })
    }

    /// The beginning of what the file says now. A file of a process that is gone is an error, also where another process
    /// has its number.
    pub(super) fn read(&mut self) -> io::Result<&[u8]> {
        let length = self.file.read_at(self.text.as_mut_slice(), 0)?;
        Ok(self.text.get(..length).unwrap_or_default())
    }
}

/// The numbers of a line, or of what is left of it, until something else comes.
pub(super) fn numbers(text: &[u8]) -> impl Iterator<Item = u64> {
    text.split(|byte| byte.is_ascii_whitespace())
        .filter(|word| !word.is_empty())
        .map_while(|word| std::str::from_utf8(word).ok()?.parse().ok())
}

/// What stands behind `key` at the beginning of a line.
pub(super) fn line<'t>(text: &'t [u8], key: &str) -> Option<&'t [u8]> {
    text.split(|byte| *byte == b'\n')
        .find_map(|line| line.strip_prefix(key.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_and_their_numbers() {
        let text = b"MemTotal:   12 kB\nMemFree: 7 kB\ncpu  1 2 3\ncpu0 9";
        assert_eq!(numbers(line(text, "MemTotal:").unwrap()).next(), Some(12));
        let all: Vec<u64> = numbers(line(text, "cpu ").unwrap()).collect();
        assert_eq!(all, [1, 2, 3]);
        assert_eq!(line(text, "Mem:"), None);
        assert_eq!(numbers(b"-1 2").next(), None);
    }
}
