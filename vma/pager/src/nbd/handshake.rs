//! NBD's fixed newstyle handshake: options until the client goes on to requests, or away.

use crate::disk::Disk;
use std::io::{Error, ErrorKind, Result};
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use vmatrix_model::manifest::PartKind;
use vmatrix_vma_image::machine;

const MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION: u64 = 0x4948_4156_454f_5054;
const REPLY: u64 = 0x0003_e889_0455_65a9;
/// Options a client may send before it goes on; QEMU sends three.
const OPTIONS_MAX: usize = 32;
/// Longest option: a name of 4096 bytes, the longest NBD has, and what is asked about it.
const OPTION_MAX: u32 = 8 << 10;
/// Longest option that is read past; a client that sends more is left.
const SKIPPED_MAX: u32 = 1 << 20;

const FIXED_NEWSTYLE: u16 = 1;
const NO_ZEROES: u16 = 2;

const EXPORT_NAME: u32 = 1;
const ABORT: u32 = 2;
const LIST: u32 = 3;
const INFO: u32 = 6;
const GO: u32 = 7;

const ACK: u32 = 1;
const SERVER: u32 = 2;
const INFORMATION: u32 = 3;
const UNSUPPORTED: u32 = (1 << 31) + 1;
const INVALID: u32 = (1 << 31) + 3;
const UNKNOWN: u32 = (1 << 31) + 6;
const TOO_BIG: u32 = (1 << 31) + 9;

/// An export that is read has these flags, is read-only, can be flushed, and looks the same over every connection.
const READ_FLAGS: u16 = 1 | 2 | 4 | 256;
/// One that is written can be flushed, trimmed, and told to have zeros.
const WRITE_FLAGS: u16 = 1 | 4 | 32 | 64;
/// Smallest, best and largest read or write.
const BLOCK_SIZES: [u32; 3] = [1, 4096, super::requests::BYTES_AT_ONCE];

/// Shakes hands over `stream`; the disk that requests are to follow for, if any.
///
/// # Errors
/// The client is gone, or does not speak NBD.
pub(crate) async fn shake<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    disks: &[Arc<Disk>],
) -> Result<Option<Arc<Disk>>> {
    let mut hello = Vec::new();
    hello.extend(MAGIC.to_be_bytes());
    hello.extend(OPTION.to_be_bytes());
    hello.extend((FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
    stream.write_all(&hello).await?;
    let flags = stream.read_u32().await?;
    if flags & !u32::from(FIXED_NEWSTYLE | NO_ZEROES) != 0 || flags & u32::from(FIXED_NEWSTYLE) == 0 {
        return Err(odd("client flags"));
    }
    for _ in 0..OPTIONS_MAX {
        if stream.read_u64().await? != OPTION {
            return Err(odd("an option"));
        }
        let (option, len) = (stream.read_u32().await?, stream.read_u32().await?);
        if len > OPTION_MAX {
            if len > SKIPPED_MAX || option == EXPORT_NAME {
                return Err(odd("an option's length"));
            }
            let read = tokio::io::copy(&mut (&mut *stream).take(len.into()), &mut tokio::io::sink()).await?;
            if read < u64::from(len) {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            reply(stream, option, TOO_BIG, b"").await?;
            continue;
        }
        let mut data = vec![0; len as usize];
        stream.read_exact(&mut data).await?;
        match option {
            EXPORT_NAME => {
                // This option has no way to refuse.
                let disk = named(disks, &data).ok_or_else(|| odd("an export's name"))?;
                let mut answer = information(disk)[2..].to_vec();
                if flags & u32::from(NO_ZEROES) == 0 {
                    answer.extend([0; 124]);
                }
                stream.write_all(&answer).await?;
                return Ok(Some(disk.clone()));
            }
            ABORT => {
                reply(stream, option, ACK, b"").await?;
                return Ok(None);
            }
            LIST if len == 0 => {
                for export in disks.iter().filter_map(|disk| machine::export(disk.kind())) {
                    let mut name = (export.len() as u32).to_be_bytes().to_vec();
                    name.extend(export.bytes());
                    reply(stream, option, SERVER, &name).await?;
                }
                reply(stream, option, ACK, b"").await?;
            }
            INFO | GO => match asked_for(&data).map(|name| named(disks, name)) {
                None => reply(stream, option, INVALID, b"").await?,
                Some(None) => reply(stream, option, UNKNOWN, b"").await?,
                Some(Some(disk)) => {
                    reply(stream, option, INFORMATION, &information(disk)).await?;
                    let mut sizes = 3u16.to_be_bytes().to_vec();
                    sizes.extend(BLOCK_SIZES.iter().flat_map(|s| s.to_be_bytes()));
                    reply(stream, option, INFORMATION, &sizes).await?;
                    reply(stream, option, ACK, b"").await?;
                    if option == GO {
                        return Ok(Some(disk.clone()));
                    }
                }
            },
            LIST => reply(stream, option, INVALID, b"").await?,
            _ => reply(stream, option, UNSUPPORTED, b"").await?,
        }
    }
    Err(odd("so many options"))
}

/// The disk that is exported under a name; under none, the root.
fn named<'a>(disks: &'a [Arc<Disk>], name: &[u8]) -> Option<&'a Arc<Disk>> {
    let is = |disk: &&Arc<Disk>| match name {
        b"" => disk.kind() == PartKind::Disk,
        name => machine::export(disk.kind()).is_some_and(|export| export.as_bytes() == name),
    };
    disks.iter().find(is)
}

/// The name in an option that asks about an export: its length, itself, and a list of what is asked.
fn asked_for(data: &[u8]) -> Option<&[u8]> {
    let (len, rest) = data.split_first_chunk::<4>()?;
    let (name, rest) = rest.split_at_checked(u32::from_be_bytes(*len) as usize)?;
    let (count, rest) = rest.split_first_chunk::<2>()?;
    (rest.len() == usize::from(u16::from_be_bytes(*count)) * 2).then_some(name)
}

/// What there is to know of the export: kind 0, size, flags.
fn information(disk: &Disk) -> Vec<u8> {
    let flags = if disk.is_writable() { WRITE_FLAGS } else { READ_FLAGS };
    let mut bytes = 0u16.to_be_bytes().to_vec();
    bytes.extend(disk.size().to_be_bytes());
    bytes.extend(flags.to_be_bytes());
    bytes
}

async fn reply<S: AsyncWrite + Unpin>(stream: &mut S, option: u32, kind: u32, data: &[u8]) -> Result<()> {
    let mut bytes = REPLY.to_be_bytes().to_vec();
    for word in [option, kind, data.len() as u32] {
        bytes.extend(word.to_be_bytes());
    }
    bytes.extend(data);
    stream.write_all(&bytes).await
}

fn odd(what: &str) -> Error {
    Error::new(ErrorKind::InvalidData, format!("a client of the disk sent {what} that NBD does not have"))
}
