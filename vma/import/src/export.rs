//! An image's disk ─▶ a file that other virtual machines take.
//!
//! ```text
//! signed manifest ─▶ disk's chunks ─verified─▶ raw ─qemu-img─▶ qcow2 │ vmdk ─▶ OVA: ovf, mf, vmdk
//! ```
//! Only the disk goes out, as it was at the suspend: memory and device state are of use to no other program,
//! and hold the guest's secrets. A guest that is started from it boots.

use crate::convert::{self, Watch};
use crate::digests;
use crate::error::{Error, Result, io};
use crate::progress::{Count, Event, Observer};
use crate::source::Format;
use crate::tar;
use ring::digest::{Context, SHA256};
use serde_json::json;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::{Command, Stdio};
use vmatrix_model::Bytes;
use vmatrix_model::manifest::{Manifest, Part, PartKind};
use vmatrix_vma_build::workshop::Scratch;
use vmatrix_vma_image::chunks::{self, Need};
use vmatrix_vma_image::{Error as ImageError, Store, sign};

/// What went out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exported {
    /// Of the disk in it.
    pub disk: Bytes,
    /// Of the file.
    pub file: Bytes,
}

/// Writes the disk of image `name` to the new file `to`. The image must be signed by one of `trusted`
/// (public keys, 64 hex digits), or by the store's own key if there are none.
///
/// # Errors
/// There is no such image, it is not trusted, a chunk is missing or damaged, `to` is there already, its disk is
/// full, or qemu-img fails; `to` is then as it was.
pub fn export(
    name: &str,
    store: &Store,
    trusted: &[String],
    format: Format,
    to: &Path,
    observer: &Observer,
) -> Result<Exported> {
    let missing = || ImageError::NoImage { name: name.to_owned(), store: store.dir().to_owned() };
    let signed = store.image(name)?.ok_or_else(missing)?;
    let own = if trusted.is_empty() { vec![sign::public(store)?] } else { trusted.to_vec() };
    let (manifest, _) = sign::verify(&signed, &own)?;
    let disk = manifest.part(PartKind::Disk).ok_or(Error::NoDisk { name: name.to_owned() })?;
    observer(Event::Note("the disk goes out as it was at the suspend; memory and device state stay"));
    if manifest.part(PartKind::Kernel).is_some() {
        observer(Event::Note(
            "this disk has no boot loader: its image was built from a recipe and boots with its own kernel only",
        ));
    }
    if manifest.part(PartKind::Base).is_some() {
        observer(Event::Note(
            "what the service shares with others is on its base's disk, which stays: this is the layer on it",
        ));
    }
    if manifest.part(PartKind::Data).is_some() {
        observer(Event::Note("its data disk stays as well"));
    }
    let mut out =
        OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(to).map_err(io("create", to))?;
    let done = write(&manifest, disk, store, format, to, &mut out, observer).and_then(|()| {
        out.sync_all().map_err(io("write", to))?;
        Ok(Exported { disk: disk.size, file: Bytes(out.metadata().map_err(io("look at", to))?.len()) })
    });
    if done.is_err() {
        // It was made here, and half of it is of no use.
        let _ = fs::remove_file(to);
    }
    done
}

fn write(
    m: &Manifest,
    disk: &Part,
    store: &Store,
    format: Format,
    to: &Path,
    out: &mut File,
    observer: &Observer,
) -> Result<()> {
    if format == Format::Raw {
        return lay(disk, store, to, out, observer);
    }
    let folder = to.parent().filter(|f| !f.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let scratch = Scratch::within(folder, &m.name)?;
    let raw = scratch.file("disk");
    let mut file = create(&raw)?;
    lay(disk, store, &raw, &mut file, observer)?;
    match format {
        Format::Raw | Format::Qcow2 => {
            observer(Event::Step("convert to qcow2"));
            convert(&file, &raw, &["-O", "qcow2"], to, out, disk.size.0, observer)
        }
        Format::Vmdk => {
            observer(Event::Step("convert to VMDK"));
            convert(&file, &raw, &STREAM, to, out, disk.size.0, observer)
        }
        Format::Ova => ova(m, disk, &scratch, &raw, &file, to, out, observer),
    }
}

/// What every other program's import reads.
const STREAM: [&str; 4] = ["-O", "vmdk", "-o", "subformat=streamOptimized"];

/// Lays the part's chunks into an empty file, holes where it is zero.
fn lay(part: &Part, store: &Store, to: &Path, out: &mut File, observer: &Observer) -> Result<()> {
    observer(Event::Step("read the disk from the store"));
    out.set_len(part.size.0).map_err(io("size", to))?;
    let mut count = Count::new(observer, part.size.0);
    for (index, chunk) in chunks::table(part, store)?.iter().enumerate() {
        let at = (index as u64).saturating_mul(part.chunk.0);
        if let Some(chunk) = chunk {
            let plain = chunks::open(&store.chunk(&chunk.digest)?, &Need::part(part, index, chunk), None)?;
            out.write_all_at(&plain, at).map_err(io("write", to))?;
        }
        count.reach(at.saturating_add(part.chunk.0));
    }
    Ok(())
}

/// Has qemu-img rewrite the raw disk in another format.
fn convert(raw: &File, path: &Path, how: &[&str], to: &Path, out: &File, size: u64, observer: &Observer) -> Result<()> {
    let source = json!({ "driver": "raw", "file": { "driver": "file", "filename": "/proc/self/fd/0" } });
    let mut command = Command::new("qemu-img");
    command.args(["convert", "-p"]).args(how).arg(format!("json:{source}")).arg(to);
    command.stdin(Stdio::from(raw.try_clone().map_err(io("read", path))?));
    let watch = Watch { what: "qemu-img convert", path, to, target: out, limit: u64::MAX, total: size };
    // Tables and what does not compress come on top.
    convert::run(command, size.saturating_add(size / 8).saturating_add(64 << 20), &watch, observer)
}

#[allow(clippy::too_many_arguments, reason = "two files, each with its name")]
fn ova(
    m: &Manifest,
    disk: &Part,
    scratch: &Scratch,
    raw: &Path,
    file: &File,
    to: &Path,
    out: &mut File,
    observer: &Observer,
) -> Result<()> {
    observer(Event::Step("convert to VMDK"));
    let vmdk = scratch.file("vmdk");
    let mut made = create(&vmdk)?;
    convert(file, raw, &STREAM, &vmdk, &made, disk.size.0, observer)?;
    let length = made.metadata().map_err(io("look at", &vmdk))?.len();
    observer(Event::Step("pack the OVA"));
    let mut count = Count::new(observer, length.saturating_mul(2));
    let mut sum = Context::new(&SHA256);
    each_block(&mut made, &vmdk, |block| {
        sum.update(block);
        count.add(block.len() as u64);
        Ok(())
    })?;
    let (disk_name, description) = (format!("{}-disk1.vmdk", m.name), describe(m, disk.size, length));
    let list =
        digests::line(&format!("{}.ovf", m.name), ring::digest::digest(&SHA256, description.as_bytes()).as_ref())
            + &digests::line(&disk_name, sum.finish().as_ref());
    for (name, text) in [(format!("{}.ovf", m.name), &description), (format!("{}.mf", m.name), &list)] {
        entry(out, to, &name, text.len() as u64, |out| out.write_all(text.as_bytes()).map_err(io("write", to)))?;
    }
    entry(out, to, &disk_name, length, |out| {
        each_block(&mut made, &vmdk, |block| {
            count.add(block.len() as u64);
            out.write_all(block).map_err(io("write", to))
        })
    })?;
    out.write_all(&[0; 2 * tar::BLOCK as usize]).map_err(io("write", to))
}

/// Appends a file to the archive: its header, its bytes, zeros up to the next block.
fn entry(out: &mut File, to: &Path, name: &str, size: u64, body: impl FnOnce(&mut File) -> Result<()>) -> Result<()> {
    out.write_all(&tar::header(name, size)).map_err(io("write", to))?;
    body(out)?;
    let zeros = usize::try_from(size.next_multiple_of(tar::BLOCK) - size).unwrap_or(0);
    out.write_all([0; tar::BLOCK as usize].get(..zeros).unwrap_or_default()).map_err(io("write", to))
}

fn each_block(file: &mut File, path: &Path, mut each: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
    file.seek(SeekFrom::Start(0)).map_err(io("read", path))?;
    let mut block = vec![0; 256 << 10];
    loop {
        match file.read(&mut block).map_err(io("read", path))? {
            0 => return Ok(()),
            length => each(block.get(..length).unwrap_or_default())?,
        }
    }
}

fn create(path: &Path) -> Result<File> {
    OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path).map_err(io("create", path))
}

/// The machine's description. Its words are an image's name and numbers: nothing in it needs escaping.
/// The standard wants the elements of an item in alphabetical order.
fn describe(m: &Manifest, capacity: Bytes, length: u64) -> String {
    let (name, cpus, memory) = (&m.name, m.machine.smp, m.machine.memory_mib);
    let (capacity, address) = (capacity.0, m.guest.address);
    format!(
        r#"<?xml version="1.0" encoding="UTF-8"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1" xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData" xmlns:vssd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData">
  <References><File ovf:id="file1" ovf:href="{name}-disk1.vmdk" ovf:size="{length}"/></References>
  <DiskSection><Info>The disk</Info><Disk ovf:diskId="disk1" ovf:fileRef="file1" ovf:capacity="{capacity}" ovf:capacityAllocationUnits="byte" ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"/></DiskSection>
  <NetworkSection><Info>Networks</Info><Network ovf:name="private"><Description>The guest's own address is {address}</Description></Network></NetworkSection>
  <VirtualSystem ovf:id="{name}"><Info>A virtual machine</Info><Name>{name}</Name>
    <OperatingSystemSection ovf:id="101"><Info>Linux, 64 bits</Info></OperatingSystemSection>
    <VirtualHardwareSection><Info>Hardware</Info>
      <System><vssd:ElementName>Hardware</vssd:ElementName><vssd:InstanceID>0</vssd:InstanceID><vssd:VirtualSystemIdentifier>{name}</vssd:VirtualSystemIdentifier><vssd:VirtualSystemType>vmx-10</vssd:VirtualSystemType></System>
      <Item><rasd:AllocationUnits>hertz * 10^6</rasd:AllocationUnits><rasd:ElementName>processors</rasd:ElementName><rasd:InstanceID>1</rasd:InstanceID><rasd:ResourceType>3</rasd:ResourceType><rasd:VirtualQuantity>{cpus}</rasd:VirtualQuantity></Item>
      <Item><rasd:AllocationUnits>byte * 2^20</rasd:AllocationUnits><rasd:ElementName>memory</rasd:ElementName><rasd:InstanceID>2</rasd:InstanceID><rasd:ResourceType>4</rasd:ResourceType><rasd:VirtualQuantity>{memory}</rasd:VirtualQuantity></Item>
      <Item><rasd:Address>0</rasd:Address><rasd:ElementName>controller</rasd:ElementName><rasd:InstanceID>3</rasd:InstanceID><rasd:ResourceSubType>AHCI</rasd:ResourceSubType><rasd:ResourceType>20</rasd:ResourceType></Item>
      <Item><rasd:AddressOnParent>0</rasd:AddressOnParent><rasd:ElementName>disk1</rasd:ElementName><rasd:HostResource>ovf:/disk/disk1</rasd:HostResource><rasd:InstanceID>4</rasd:InstanceID><rasd:Parent>3</rasd:Parent><rasd:ResourceType>17</rasd:ResourceType></Item>
      <Item><rasd:AutomaticAllocation>true</rasd:AutomaticAllocation><rasd:Connection>private</rasd:Connection><rasd:ElementName>network</rasd:ElementName><rasd:InstanceID>5</rasd:InstanceID><rasd:ResourceType>10</rasd:ResourceType></Item>
    </VirtualHardwareSection>
  </VirtualSystem>
</Envelope>
"#
    )
}
