output "store" {
  description = "URL of the store."
  value       = "s3://${aws_s3_bucket.store.id}"
}

output "kubeconfig" {
  description = "Command that points kubectl at the cluster."
  value       = "aws eks update-kubeconfig --region ${var.region} --name ${aws_eks_cluster.main.name}"
}

output "work_role" {
  description = "Role of the pods that use the store."
  value       = aws_iam_role.work.arn
}

output "ray" {
  description = "The setting `ray`: where machines of `ray up` live."
  value = {
    subnets        = [for zone in var.zones : aws_subnet.public[zone].id]
    security_group = aws_security_group.ray.id
  }
}
