//! QEMU's monitor, which is libvirt's: one command, one answer.

use crate::error::{Error, Result};
use nix::libc;
use serde_json::{Value, json};
use std::ffi::{CStr, CString};
use std::fs::File;
use std::os::fd::AsRawFd;
use virt::domain::Domain;

/// Runs a command and returns what it answers.
///
/// # Errors
/// QEMU's words, or libvirt's.
pub(crate) fn ask(domain: &Domain, vm: &str, what: &'static str, command: &str, arguments: Value) -> Result<Value> {
    let line = json!({ "execute": command, "arguments": arguments }).to_string();
    let said = domain.qemu_monitor_command(&line, 0).map_err(|e| refused(command, &e))?;
    read(vm, what, &said)
}

/// Gives QEMU an open file and returns its `/dev/fdset` number. The set stays until [`take_back`].
pub(crate) fn give(domain: &Domain, vm: &str, what: &'static str, file: &File) -> Result<u64> {
    let said = with_file(domain, &json!({ "execute": "add-fd" }).to_string(), file)?;
    let answer = read(vm, what, &said)?;
    answer.get("fdset-id").and_then(Value::as_u64).ok_or_else(|| Error::Refused {
        name: vm.to_owned(),
        what,
        said: format!("add-fd answered {answer}"),
    })
}

/// Has QEMU close a file that it was given.
pub(crate) fn take_back(domain: &Domain, vm: &str, set: u64) -> Result<()> {
    ask(domain, vm, "close a file", "remove-fd", json!({ "fdset-id": set })).map(drop)
}

/// The state of QEMU's migration: `active`, `completed`, `failed`, and why.
pub(crate) fn migration(domain: &Domain, vm: &str, what: &'static str) -> Result<(String, String)> {
    let answer = ask(domain, vm, what, "query-migrate", json!({}))?;
    let word = |key: &str| answer.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    Ok((word("status"), word("error-desc")))
}

/// Guest memory is in its file: only the rest is saved and loaded.
pub(crate) fn ignore_shared(domain: &Domain, vm: &str, what: &'static str) -> Result<()> {
    let list = json!({ "capabilities": [{ "capability": "x-ignore-shared", "state": true }] });
    ask(domain, vm, what, "migrate-set-capabilities", list).map(drop)
}

pub(crate) fn refused(what: &str, e: &virt::error::Error) -> Error {
    Error::Libvirt { what: what.to_owned(), said: e.message().to_owned() }
}

fn read(vm: &str, what: &'static str, said: &str) -> Result<Value> {
    let fail = |said: String| Error::Refused { name: vm.to_owned(), what, said };
    let mut answer: Value = serde_json::from_str(said).map_err(|e| fail(format!("not JSON: {e}")))?;
    if let Some(error) = answer.get("error") {
        return Err(fail(error.get("desc").and_then(Value::as_str).unwrap_or("no reason given").to_owned()));
    }
    Ok(answer.get_mut("return").map_or(Value::Null, Value::take))
}

/// The crate wraps the command without files only.
fn with_file(domain: &Domain, command: &str, file: &File) -> Result<String> {
    let fail = |said: String| Error::Libvirt { what: "give QEMU a file".to_owned(), said };
    let command = CString::new(command).map_err(|e| fail(e.to_string()))?;
    let mut files = [file.as_raw_fd()];
    let mut result: *mut libc::c_char = std::ptr::null_mut();
    // SAFETY: the domain, the command, the array of one descriptor and the place of the result outlive the call; no
    // descriptors are asked back.
    #[allow(unsafe_code)]
    let status = unsafe {
        virt_sys::virDomainQemuMonitorCommandWithFiles(
            domain.as_ptr(),
            command.as_ptr(),
            1,
            files.as_mut_ptr(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            &raw mut result,
            0,
        )
    };
    if status < 0 || result.is_null() {
        return Err(fail(virt::error::Error::last_error().message().to_owned()));
    }
    // SAFETY: libvirt answered a string that ends in a zero and is the caller's to free.
    #[allow(unsafe_code)]
    let said = unsafe {
        let said = CStr::from_ptr(result).to_string_lossy().into_owned();
        libc::free(result.cast());
        said
    };
    Ok(said)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_its_return_and_an_error_is_qemus_words() {
        assert_eq!(read("v", "x", r#"{"return":{"a":1},"id":"libvirt-1"}"#).unwrap(), json!({ "a": 1 }));
        let e = read("v", "load", r#"{"id":"l","error":{"class":"GenericError","desc":"no such thing"}}"#).unwrap_err();
        assert_eq!(e.to_string(), "QEMU of \"v\" refused to load: no such thing");
        assert!(read("v", "load", "garbage").is_err());
    }
}
