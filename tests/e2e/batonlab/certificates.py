"""A certificate authority for a lab, made with openssl."""
import os
import subprocess


class Authority:
    def __init__(self, directory):
        self.dir = directory
        os.makedirs(directory)
        self.ca = os.path.join(directory, "ca.pem")
        self._key = os.path.join(directory, "ca.key")
        self._openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
                      "-subj", "/CN=lab", "-keyout", self._key, "-out", self.ca)

    @staticmethod
    def _openssl(*words):
        subprocess.run(["openssl", *words], check=True, capture_output=True)

    def issue(self, name, subject, addresses=()):
        """Makes NAME.pem and NAME.key; returns {"ca":, "cert":, "key":}."""
        cert, key, request = (os.path.join(self.dir, name + suffix) for suffix in (".pem", ".key", ".csr"))
        extensions = os.path.join(self.dir, name + ".ext")
        names = [f"IP:{address}" for address in ("127.0.0.1", *addresses)] + ["DNS:localhost", f"DNS:{name}"]
        with open(extensions, "w", encoding="utf-8") as file:
            file.write("subjectAltName=" + ",".join(names) + "\nextendedKeyUsage=serverAuth,clientAuth\n")
        self._openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", subject,
                      "-keyout", key, "-out", request)
        self._openssl("x509", "-req", "-in", request, "-CA", self.ca, "-CAkey", self._key, "-CAcreateserial", "-days", "2",
                      "-extfile", extensions, "-out", cert)
        return {"ca": self.ca, "cert": cert, "key": key}
